"""Making the records agree with the world: no run and no task stays `Running` after its process is gone.

    python -m flows.running.settle WORKSPACE RUN FLOW_RUN_ID ATTEMPT      what a run's watcher does (`watch.py`)

A run's own record says how it ended, or, where nobody holds its lock, that it crashed. Prefect is told so if it missed it: the
process died, or the server was away when the run ended.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

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
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed
from pydantic import ValidationError

from flows.asked.graph import SINGLE, WHOLE
from flows.asked.parameters import workspace_of
from flows.launch import choose
from flows.records.run_record import CANCELLED, RunFolder, RunIsLive, RunRecord, all_runs, now
from flows.server.client import AWAY
from flows.show.ending import tell_end
from flows.show.pages.board import Board
from stages.contracts.config import PipelineConfig

PATIENCE = 120.0  # seconds that a run's process may take, after the run's end, to tell Prefect of it: it tries for a minute
AGAIN = 60.0, 3.0  # seconds that a watcher tries to reach Prefect, and between two attempts


def settle(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of a flow run that crashed or was cancelled: end the task runs that it left."""
    workspace = workspace_of(flow_run.parameters)
    records = all_runs(workspace) if workspace is not None else []
    record = next((each for each in records if each.flow_run_id == str(flow_run.id)), None)
    with get_client(sync_client=True) as client:
        if record is not None and record.error == CANCELLED:  # by the run itself: no runner tells it
            client.set_flow_run_state(flow_run.id, Cancelled(), force=True)
        _end_tasks(client, flow_run, record)


def reconcile(workspaces: Collection[Path], on_trouble: Callable[[str], None] = lambda told: None) -> list[str]:
    """Mark the runs whose process is gone, here and in Prefect, of these workspaces and of all that Prefect believes to go on.

    Returns their names. Runs that somebody takes up at this moment are left alone, and so are retries that are scheduled.

    Args:
        on_trouble: is told, in a line, what could not be read or marked, such as the run of another person.
    """

    def runs_of(place: Path) -> list[RunRecord]:
        try:
            return all_runs(place)
        except OSError as error:
            on_trouble(f"the runs of {place} cannot be read, and are left as they are: {error}")
            return []

    def is_marked(folder: RunFolder) -> bool:
        try:
            return _mark(folder)
        except OSError as error:  # of its folder: it says nothing of the server, nor of the other runs
            on_trouble(f"the run {folder.path} seems to have crashed; only who may write there can mark it: {error}")
            return False

    with get_client(sync_client=True) as client:
        going_on = _going_on(client)
        places = {*workspaces, *filter(None, (workspace_of(flow_run.parameters) for flow_run in going_on))}
        runs = [(workspace, record) for workspace in sorted(places) for record in runs_of(workspace)]
        lost = [RunFolder(workspace, record.name) for workspace, record in runs if record.state == "crashed"]
        marked = [folder.name for folder in lost if is_marked(folder)]
        ended = {record.flow_run_id: record for place in places for record in runs_of(place) if _is_over(record)}
        for flow_run in going_on:
            record = ended.get(str(flow_run.id))
            if record is not None and flow_run.run_count <= record.attempt:
                _tell(client, flow_run, record)
    return marked


def tell_before_it_is_forgotten(record: RunRecord | None, flow_run_id: str) -> None:
    """Tell Prefect how a run ended whose record is about to be replaced by that of another flow run, if it does not know yet.

    For who holds the run's lock: its process, which may still try to tell it, has no part in it any more.
    """
    if record is None or record.flow_run_id in (None, flow_run_id):
        return
    with suppress(*AWAY, ObjectNotFound), get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(record.flow_run_id))
        if _goes_on(flow_run):
            _tell(client, flow_run, record.crashed() if record.state == "running" else record)


def _goes_on(flow_run: FlowRun) -> bool:
    """Whether Prefect believes that somebody does it now."""
    return flow_run.state is not None and (flow_run.state.is_running() or flow_run.state.is_cancelling())


def _tell(client: SyncPrefectClient, flow_run: FlowRun, record: RunRecord) -> None:
    """Tell Prefect how a run ended."""
    was_cancelled = flow_run.state is not None and flow_run.state.is_cancelling()
    with suppress(ObjectNotFound):  # it was deleted meanwhile
        client.set_flow_run_state(flow_run.id, _state_of(record, was_cancelled), force=True)
        _end_tasks(client, flow_run, record)


def _is_over(record: RunRecord) -> bool:
    """Whether nobody will tell Prefect any more how a run ended: its process is gone, or should have told it long ago."""
    if record.state == "crashed":  # also where that could not be written down
        return True
    if record.finished is None:
        return False
    is_gone = record.machine == socket.gethostname() and not _lives(record.pid)
    return is_gone or (now() - record.finished).total_seconds() > PATIENCE


def _lives(pid: int) -> bool:
    """Whether there is a process of this number, which has not ended."""
    if Path("/proc/self").exists():
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # ended, and nobody asked how
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _mark(folder: RunFolder) -> bool:
    """Write into a run's record that it crashed, if it did."""
    try:
        with folder.held():
            record = folder.stored()
            if record is None or record.state != "running":  # it ended, or another has marked it
                return False
            record = record.crashed().model_copy(update={"finished": now()})
            for node in record.nodes.values():
                if node.state == "running":
                    node.state, node.error, node.done = "stopped", record.error, None
            folder.write(record)
    except RunIsLive:
        return False
    tell_end(folder, Board(record.flow_run_id), record)  # that takes a while, and the run may be taken up again
    return True


def _going_on(client: SyncPrefectClient) -> list[FlowRun]:
    """The runs of our flows that Prefect believes to be going on."""
    types = [StateType.RUNNING, StateType.CANCELLING]
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[WHOLE, SINGLE])),
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


def main(workspace: Path, name: str, flow_run_id: str, attempt: int) -> None:
    """What the watcher of a run does. It ends when nothing of the run is left."""
    folder = RunFolder(workspace, name)
    with suppress(OSError):  # a full disk, say: what else is to do does not need it
        _mark(folder)
    record = folder.read()
    if record is None or (record.flow_run_id, record.attempt) != (flow_run_id, attempt):  # it had no record yet
        _until_told(lambda client: _crash(client, UUID(flow_run_id), attempt))
    elif record.state != "running":  # else it was taken up again
        clean = threading.Thread(target=_remove_left, args=[record, workspace])  # that waits until the run's work is saved
        clean.start()
        _until_told(lambda client: reconcile([workspace]))
        clean.join()


def _until_told(tell: Callable[[SyncPrefectClient], object]) -> None:
    until = time.monotonic() + AGAIN[0]
    while True:
        with suppress(*AWAY), get_client(sync_client=True) as client:
            tell(client)
            return
        if time.monotonic() > until:
            return
        time.sleep(AGAIN[1])  # nothing tells when a server is back


def _crash(client: SyncPrefectClient, flow_run_id: UUID, attempt: int) -> None:
    """Tell Prefect that a flow run's process is gone, unless another does it by now."""
    with suppress(ObjectNotFound):
        flow_run = client.read_flow_run(flow_run_id)
        if flow_run.run_count <= attempt and _goes_on(flow_run):
            client.set_flow_run_state(flow_run_id, Crashed(message="its process is gone"), force=True)
            _end_tasks(client, flow_run, None)


def _remove_left(record: RunRecord, workspace: Path) -> None:
    with suppress(ValidationError):
        choose.remove_left(PipelineConfig.model_validate(record.config), workspace)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
