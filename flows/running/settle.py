"""Making the records agree with the world: no run and no task stays `Running` after its process is gone.

    python -m flows.running.settle WORKSPACE RUN      what a run's watcher does (`watch.py`); safe at any time

A run's own record says how it ended, or, where nobody holds its lock, that it crashed. Prefect is told so if it missed it: the
process died, or the server was away when the run ended.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed
from pydantic import ValidationError

from flows.launch import choose
from flows.records.run_record import RunFolder, RunIsLive, RunRecord, all_runs, now
from flows.show.ending import tell_end
from stages.contracts.config import PipelineConfig

PATIENCE = 120.0  # seconds that a run may take, after its end, to tell Prefect of it: it tries for a minute
FLOWS = ["finetune-llama2", "stage"]  # ours, by their names in Prefect


def settle(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of a flow run that crashed or was cancelled: end the task runs that it left."""
    with get_client(sync_client=True) as client:
        _end_tasks(client, flow_run, None)


def reconcile(workspace: Path) -> list[str]:
    """Mark the runs of this workspace whose process is gone, here and in Prefect. Returns their names.

    Runs that somebody takes up at this moment are left alone, and so are retries that are scheduled.
    """
    marked = [record.name for record in all_runs(workspace) if record.finished is None and _mark(workspace, record)]
    ended = {record.flow_run_id: record for record in all_runs(workspace) if _is_over(record)}
    with get_client(sync_client=True) as client:
        for flow_run in _going_on(client):
            record = ended.get(str(flow_run.id))
            if record is not None and flow_run.run_count <= record.attempt:
                was_cancelled = flow_run.state is not None and flow_run.state.is_cancelling()
                client.set_flow_run_state(flow_run.id, _state_of(record, was_cancelled), force=True)
                _end_tasks(client, flow_run, record)
    return marked


def _is_over(record: RunRecord) -> bool:
    """Whether nobody will tell Prefect any more how a run ended: its process is gone, or should have told it long ago."""
    return record.finished is not None and (record.state == "crashed" or (now() - record.finished).total_seconds() > PATIENCE)


def _mark(workspace: Path, record: RunRecord) -> bool:
    """Write into a run's record that it crashed, if it did."""
    if record.state != "crashed":
        return False
    folder = RunFolder(workspace, record.name)
    try:
        with folder.held():
            for node in record.nodes.values():
                if node.state == "running":
                    node.state, node.error, node.done = "stopped", record.error, None
            folder.write(record.model_copy(update={"finished": now()}))
    except RunIsLive:
        return False
    tell_end(folder)
    return True


def _going_on(client: SyncPrefectClient) -> list[FlowRun]:
    """The runs of our flows that Prefect believes to be going on."""
    types = [StateType.RUNNING, StateType.CANCELLING]
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=FLOWS)),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types))),
    )


def _state_of(record: RunRecord, was_cancelled: bool) -> State[Any]:
    if record.state == "done":
        return Completed(message="it was done while the server was away")
    if was_cancelled:
        return Cancelled(message=record.error)
    return Failed(message=record.error) if record.state == "failed" else Crashed(message=record.error)


def _end_tasks(client: SyncPrefectClient, flow_run: FlowRun, record: RunRecord | None) -> None:
    """End the task runs of a flow run that has ended: as the record says, or as crashed."""
    for task_run in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))):
        if task_run.state is not None and task_run.state.is_final():
            continue
        node = record.nodes.get(task_run.name) if record is not None else None
        is_done = node is not None and node.state in ("ran", "cached")
        ended: State[Any] = (
            Completed() if is_done else Crashed(message=(record.error if record else None) or "the run ended before it")
        )
        client.set_task_run_state(task_run.id, ended, force=True)


def main(workspace: Path, name: str) -> None:
    """What the watcher of a run does. It ends when nothing of the run is left."""
    reconcile(workspace)
    record = RunFolder(workspace, name).read()
    if record is not None and record.state != "running":
        with suppress(ValidationError):
            choose.remove_left(PipelineConfig.model_validate(record.config), workspace)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
