"""Prefect's runner, but for how it ends runs: with patience, once, and whatever becomes of the server meanwhile."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Self
from uuid import UUID

from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner

from flows.server.client import AWAY

POLL_SECONDS = 1.5
GRACE_SECONDS = 660.0  # of a run that is cancelled: a training may take 600 to save its checkpoint (flows.launch)


class PatientRunner(Runner):
    """Prefect's runner, but for how it ends a run: Prefect's kills after 30 seconds, in the middle of a checkpoint."""

    def __init__(self) -> None:
        super().__init__(name="finetune", query_seconds=POLL_SECONDS, pause_on_shutdown=False, limit=None)
        self._ending: set[UUID] = set()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._process_manager.kill = self._end  # type: ignore[method-assign]  # Prefect has no hook for it
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

    def cancel(self, flow_run_ids: Iterable[UUID], why: str | None = None) -> None:
        """Stop flow runs, gracefully, and call them cancelled. Returns at once."""
        for flow_run_id in flow_run_ids:
            self._runs_task_group.start_soon(self._cancel_run, flow_run_id, why)

    async def _cancel_run(self, flow_run: FlowRun | UUID, state_msg: str | None = None) -> None:
        """As Prefect does, but once however many ask for it; and a server that is away does not end the runner with it."""
        flow_run_id = flow_run if isinstance(flow_run, UUID) else flow_run.id
        if flow_run_id in self._ending:
            return
        self._ending.add(flow_run_id)
        try:
            with suppress(*AWAY, ObjectNotFound):  # it is asked for again: see_cancellations
                state = (await self._client.read_flow_run(flow_run_id)).state
                if state is None or not state.is_final() or state.is_cancelled():  # else only its process has not quite ended
                    await super()._cancel_run(flow_run, state_msg)
        finally:
            self._ending.discard(flow_run_id)

    async def see_cancellations(self) -> None:
        """Stop what should be cancelled. Prefect listens for events of it, but no more once the server was away."""
        if not self.going_on:
            return
        asked = FlowRunFilter(
            id=FlowRunFilterId(any_=list(self.going_on)),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
        )
        self.cancel(flow_run.id for flow_run in await self._client.read_flow_runs(flow_run_filter=asked))
