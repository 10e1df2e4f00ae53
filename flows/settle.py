"""Making the records agree with the world: no run and no task stays `Running` after its process is gone."""

from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.run_record import RunFolder, RunIsLive, all_runs, now


def settle(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of a flow run that crashed or was cancelled: end the task runs that it left."""
    with get_client(sync_client=True) as client:
        _crash_tasks(client, flow_run.id, "the run ended before it")


def reconcile(workspace: Path) -> list[str]:
    """Mark the runs of this workspace whose process is gone as crashed, here and in Prefect. Returns their names."""
    dead = [record for record in all_runs(workspace) if record.state == "crashed" and record.finished is None]
    if not dead:
        return []
    with get_client(sync_client=True) as client:
        for record in dead:
            folder = RunFolder(workspace, record.name)
            try:
                with folder.held():
                    for node in record.nodes.values():
                        if node.state == "running":
                            node.state, node.error, node.done = "stopped", record.error, None
                    folder.write(record.model_copy(update={"finished": now()}))
            except RunIsLive:
                continue  # somebody took it up this moment
            if record.flow_run_id is not None:
                _crash_run(client, UUID(record.flow_run_id), record.error or "its process is gone")
    return [record.name for record in dead]


def _crash_run(client: SyncPrefectClient, flow_run_id: UUID, message: str) -> None:
    try:
        flow_run = client.read_flow_run(flow_run_id)
        if flow_run.state is None or not flow_run.state.is_final():
            client.set_flow_run_state(flow_run_id, Crashed(message=message), force=True)
        _crash_tasks(client, flow_run_id, message)
    except ObjectNotFound:
        pass  # the record is from another server


def _crash_tasks(client: SyncPrefectClient, flow_run_id: UUID, message: str) -> None:
    for task_run in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
