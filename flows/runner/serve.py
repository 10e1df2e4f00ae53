"""The runner of a machine: it deploys our flows to a Prefect server and does the runs that are started there.

It is Prefect's own runner, as of `flow.serve`, not a worker of a work pool: a worker that is stopped kills its runs and leaves
them `Running`. Each run is a process of its own, which outlives a runner that is killed. Asked to stop, the runner takes no
more runs and waits for those that go on; asked again, it stops them, gracefully. It starts by settling what an earlier one
left, and looks from time to time whether there is more.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.runner.deployments import Deployment
from flows.running.settle import reconcile

POLL_SECONDS = 1.5
SETTLE_SECONDS = 15.0
GRACE_SECONDS = 660.0  # of a run that is cancelled: a training may take 600 to save its checkpoint (flows.launch)
AWAY = (httpx.HTTPError, PrefectHTTPStatusError, OSError)


class PatientRunner(Runner):
    """Prefect's runner, but for how it ends a run: Prefect's kills after 30 seconds, in the middle of a checkpoint."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._process_manager.kill = self._end  # type: ignore[method-assign]
        observer = self._cancelling_observer
        if observer is not None and observer._consumer_task is not None:
            # It listens; where the server goes away it would poll, give up, and print a traceback. We look, too (below).
            observer._consumer_task.remove_done_callback(observer._start_polling_task)
        return self

    async def _end(self, flow_run_id: UUID, grace_seconds: float = GRACE_SECONDS, *, force: bool = False) -> None:
        """Stop the process of a flow run: SIGTERM, and SIGKILL after our grace period, not Prefect's."""
        handle = self._process_manager.get(flow_run_id)
        if handle is None or handle.pid is None:
            return
        with suppress(ProcessLookupError):
            if not force:
                handle.graceful_kill()
                give_up = asyncio.get_running_loop().time() + GRACE_SECONDS
                while handle.is_alive() and asyncio.get_running_loop().time() < give_up:
                    await asyncio.sleep(0.1)
            if handle.is_alive():
                handle.hard_kill()

    @property
    def going_on(self) -> set[UUID]:
        """The flow runs that were taken and have not ended."""
        return set(self._scheduled_run_poller._submitting_flow_run_ids)

    async def take_runs(self) -> None:
        """Start what is scheduled."""
        await self._scheduled_run_poller._get_and_submit_flow_runs()

    async def cancel(self, flow_run_id: UUID, why: str) -> None:
        """Stop a flow run, gracefully, and call it cancelled."""
        with suppress(*AWAY, ObjectNotFound):
            await self._cancel_run(flow_run_id, why)

    async def see_cancellations(self) -> None:
        """Stop what should be cancelled. Prefect listens for events of it, but no more once the server was away."""
        if not self.going_on:
            return
        asked = FlowRunFilter(
            id=FlowRunFilterId(any_=list(self.going_on)),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
        )
        for flow_run in await self._client.read_flow_runs(flow_run_filter=asked):
            self._runs_task_group.start_soon(self._cancel_run, flow_run.id)


class Requests:
    """How often the runner was asked to stop."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self.changed.set()


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """SIGTERM, and Ctrl-C, which the runs' processes are spared: a terminal sends it to them as well."""
    loop, requests, ended = asyncio.get_running_loop(), Requests(), threading.Event()
    resource_tracker.ensure_running()  # it would unblock what is blocked here
    # What is started from this thread inherits that Ctrl-C is blocked; another thread takes it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def take_interrupts() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ended.wait()

    thread = threading.Thread(target=take_interrupts, name="interrupts", daemon=True)
    thread.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, requests.add)
    try:
        yield requests
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        ended.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        self.runner = PatientRunner(name="finetune", query_seconds=POLL_SECONDS, pause_on_shutdown=False, limit=None)
        self._shown: set[UUID] = set()
        self._is_away = False
        self._next_settling = 0.0

    async def run(self, asked: Sequence[Deployment], on_ready: Callable[[], None]) -> None:
        with stop_requests() as requests:
            await self._settle()
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

    async def _drain(self, requests: Requests) -> None:
        told = 0
        while self.runner.going_on:
            if requests.count > told:
                told = requests.count
                number = len(self.runner.going_on)
                runs = "the run that goes on" if number == 1 else f"the {number} runs that go on"
                if told == 1:
                    self.say(f"takes no more runs, and waits for {runs}. Once more (Ctrl-C, SIGTERM) stops what goes on")
                elif told == 2:
                    self.say(f"stops {runs}; trainings save a checkpoint first")
                    for flow_run_id in self.runner.going_on:
                        why = "its runner was stopped; retry it to go on"
                        self.runner._runs_task_group.start_soon(self.runner.cancel, flow_run_id, why)
                else:
                    os._exit(130)  # the runs' processes end by themselves
            await self._round(takes_runs=False)
            await _sleep(0.2, requests)
        await self._show()

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
        else:
            if self._is_away:
                self.say("the Prefect server answers again")
            self._is_away = False

    async def _settle(self) -> None:
        for workspace in self.workspaces:
            if (workspace / "runs").is_dir():
                for name in await asyncio.to_thread(reconcile, workspace):
                    self.say(f"{name}  crashed: its process is gone")
        self._next_settling = asyncio.get_running_loop().time() + SETTLE_SECONDS

    async def _show(self) -> None:
        """A line for every run that began, and that ended."""
        going_on = self.runner.going_on
        for flow_run_id in going_on ^ self._shown:
            with suppress(ObjectNotFound):
                flow_run = await self.runner._client.read_flow_run(flow_run_id)
                state: Any = flow_run.state
                words = "started" if flow_run_id in going_on else state.name if state is not None else "ended"
                message = (
                    state.message if flow_run_id not in going_on and state is not None and not state.is_completed() else None
                )
                name = flow_run.parameters.get("run_name") or flow_run.name  # it is called so once it begins
                self.say("  ".join(filter(None, [name, words, (message or "").partition("\n")[0][:160]])))
        self._shown = going_on


async def _sleep(seconds: float, requests: Requests) -> None:
    """Sleep, less long when a request to stop comes."""
    requests.changed.clear()
    with suppress(TimeoutError):
        await asyncio.wait_for(requests.changed.wait(), seconds)
