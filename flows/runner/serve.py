"""The runner of a machine: it deploys our flows to a Prefect server and does the runs that are started there.

It is Prefect's own runner, as of `flow.serve`, not a worker of a work pool: a worker that is stopped kills its runs and leaves
them `Running`. Each run is a process of its own, which outlives a runner that is killed. Asked to stop, the runner takes no
more runs and waits for those that go on; asked again, it stops them, gracefully. It starts by settling what an earlier one
left, and looks from time to time whether there is more.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from flows.asked.parameters import workspace_of
from flows.runner.deployments import Deployment
from flows.runner.patient import POLL_SECONDS, PatientRunner
from flows.runner.requests import Requests, stop_requests
from flows.running.settle import reconcile
from flows.server.client import AWAY
from stages.contracts.words import plain

SETTLE_SECONDS = 15.0


def serve(
    asked: Sequence[Deployment], workspaces: Sequence[Path], *, say: Callable[[str], None], on_ready: Callable[[], None]
) -> None:
    """Deploy, and run what is asked for, until told to stop.

    Args:
        workspaces: where runs may have left something to settle.
    """
    asyncio.run(_Serving(workspaces, say).run(asked, on_ready))


class _Serving:
    def __init__(self, workspaces: Sequence[Path], say: Callable[[str], None]) -> None:
        self.workspaces = workspaces
        self.say = say
        self.runner = PatientRunner()
        self._shown: set[UUID] = set()
        self._troubles: set[str] = set()
        self._is_away = False
        self._next_settling = 0.0

    async def run(self, asked: Sequence[Deployment], on_ready: Callable[[], None]) -> None:
        with stop_requests() as requests:
            with suppress(*AWAY):  # it is done again, from time to time
                await self._settle()
            await self._tell_of_other_workspaces(asked)
            for each in asked:
                await self.runner.aadd_flow(
                    each.flow, name=each.name, parameters=each.parameters, description=each.about,
                    entrypoint_type=EntrypointType.MODULE_PATH,
                )  # fmt: skip
            async with self.runner:
                on_ready()
                while not requests.count:
                    await self._round(takes_runs=True)
                    await _sleep(POLL_SECONDS, requests)
                await self._drain(requests)

    async def _tell_of_other_workspaces(self, asked: Sequence[Deployment]) -> None:
        """A server has one deployment of a name: who deploys it again says where the runs of all its runners work."""
        moved: dict[tuple[Path | None, Path | None], list[str]] = {}
        async with get_client() as client:
            for each in asked:
                with suppress(ObjectNotFound):
                    known = await client.read_deployment_by_name(each.full_name)
                    before, now = workspace_of(known.parameters), workspace_of(each.parameters)
                    if before != now:
                        moved.setdefault((before, now), []).append(each.full_name)
        for (before, now), names in moved.items():
            self.say(
                f"{', '.join(names)}: on this server for the workspace {before} so far, from now on for {now}, also where "
                "another runner does them; runners of several workspaces want servers, or configurations, of their own"
            )

    async def _drain(self, requests: Requests) -> None:
        told = 0
        while self.runner.going_on:
            if requests.count > told:
                told += 1  # two that come at once are two
                number = len(self.runner.going_on)
                runs = "the run that goes on" if number == 1 else f"the {number} runs that go on"
                if told == 1:
                    self.say(f"takes no more runs, and waits for {runs}. Once more (Ctrl-C, SIGTERM) stops what goes on")
                elif told == 2:
                    self.say(f"stops {runs}; trainings save a checkpoint first")
                    self.runner.cancel(self.runner.going_on, "its runner was stopped; retry it to go on")
                else:
                    os._exit(130)  # the runs' processes end by themselves
            await self._round(takes_runs=False)
            if requests.count == told:
                await _sleep(POLL_SECONDS, requests)
        with suppress(*AWAY):
            await self._show(is_last=True)

    async def _round(self, *, takes_runs: bool) -> None:
        """One look at the server, which may be away for a while."""
        try:
            if takes_runs:
                await self.runner.take_runs()
            await self.runner.see_cancellations()
            await self._show()
            if asyncio.get_running_loop().time() >= self._next_settling:
                await self._settle()
        except AWAY as error:
            if not self._is_away:
                self.say(f"the Prefect server does not answer ({type(error).__name__}); runs go on meanwhile")
            self._is_away = True
        except Exception as error:  # the runner's end would be that of its runs
            self._tell_once(f"{type(error).__name__}: {error}")
        else:
            if self._is_away:
                self.say("the Prefect server answers again")
            self._is_away = False

    async def _settle(self) -> None:
        for name in await asyncio.to_thread(reconcile, self.workspaces, self._tell_once):
            self.say(f"{name}  crashed: its process is gone")
        self._next_settling = asyncio.get_running_loop().time() + SETTLE_SECONDS

    def _tell_once(self, trouble: str) -> None:
        """It is met at every settling, and tells nothing new."""
        if trouble not in self._troubles:
            self.say(plain(trouble))
        self._troubles.add(trouble)

    async def _show(self, *, is_last: bool = False) -> None:
        """A line for every run that began, and that ended: once Prefect knows how."""
        going_on = self.runner.going_on
        shown = set(going_on)
        for flow_run_id in going_on ^ self._shown:
            with suppress(ObjectNotFound):
                flow_run = await self.runner._client.read_flow_run(flow_run_id)
                state: Any = flow_run.state
                is_here = flow_run_id in going_on
                is_told = state is not None and not state.is_running() and not state.is_cancelling()
                if not is_here and not is_told and not is_last:
                    shown.add(flow_run_id)
                    continue
                words = "started" if is_here else state.name if is_told else "ended"
                message = None if is_here or not is_told or state.is_completed() else state.message
                name = flow_run.parameters.get("run_name") or flow_run.name  # it is called so once it begins
                self.say(plain("  ".join(filter(None, [name, words, (message or "").partition("\n")[0][:160]]))))
        self._shown = shown


async def _sleep(seconds: float, requests: Requests) -> None:
    """Sleep, less long when a request to stop comes."""
    requests.changed.clear()
    with suppress(TimeoutError):
        await asyncio.wait_for(requests.changed.wait(), seconds)
