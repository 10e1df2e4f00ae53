"""What Prefect is told of a run whose process is gone, by whoever settles it: another run, a runner, the run's watcher."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from fake_stages import config
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Running

from flows.finetune import finetune
from flows.records.run_record import RunFolder, RunRecord, now
from flows.running import settle
from flows.server.local import Server


@pytest.fixture
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def flow_run(client: SyncPrefectClient, tmp_path: Path) -> FlowRun:
    """One that Prefect believes to go on."""
    parameters = {"config": config(tmp_path).model_dump(mode="json")}
    flow_run = client.create_flow_run(finetune, name="brisk-otter", parameters=parameters, state=Running())
    return client.read_flow_run(flow_run.id)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def ended(workspace: Path, flow_run: FlowRun, pid: int, state: str) -> None:
    """The record of a run that has just ended, before it told Prefect."""
    folder = RunFolder(workspace, flow_run.name)
    folder.path.mkdir(parents=True)
    record = {"name": flow_run.name, "config": {}, "cwd": "/", "pid": pid, "state": state, "error": "stopped"}
    folder.write(RunRecord(**record, started=now(), finished=now(), flow_run_id=str(flow_run.id), attempt=flow_run.run_count))


@pytest.mark.parametrize(("state", "told"), [("stopped", "Crashed"), ("failed", "Failed"), ("done", "Completed")])
def test_a_process_that_died_before_it_told_its_end(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int, state: str, told: str
) -> None:
    """At the second Ctrl-C, say. The run's name may be taken up at once: there is no time to wait."""
    ended(tmp_path, flow_run, dead, state)
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == told


def test_a_process_that_lives_tells_its_end_itself(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it should have told it long ago."""
    ended(tmp_path, flow_run, os.getpid(), "done")
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == "Running"
    monkeypatch.setattr(settle, "PATIENCE", 0.0)
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == "Completed"


def test_a_process_that_nobody_has_asked_how_it_ended_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # ends with it
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not settle._lives(process.pid)
    assert settle._lives(os.getpid())


def test_a_flow_run_that_is_deleted_meanwhile(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(tmp_path, flow_run, dead, "failed")
    client.delete_flow_run(flow_run.id)
    monkeypatch.setattr(settle, "_going_on", lambda client: [flow_run])  # as it was a moment ago
    settle.reconcile([tmp_path])


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_run_that_died_before_it_had_a_record(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int, attempt: int
) -> None:
    """While it was checked: its name may have a record, of an earlier run or of its own last attempt."""
    if attempt:
        ended(tmp_path, flow_run, dead, "failed")
    settle.main(tmp_path, flow_run.name, str(flow_run.id), flow_run.run_count + attempt)
    assert client.read_flow_run(flow_run.id).state_name == "Crashed"


def test_a_run_that_another_process_does_by_now_is_left_alone(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path
) -> None:
    settle.main(tmp_path, flow_run.name, str(flow_run.id), flow_run.run_count - 1)
    assert client.read_flow_run(flow_run.id).state_name == "Running"
    settle.main(tmp_path, flow_run.name, str(UUID(int=7)), 1)  # it was deleted


def test_a_record_that_is_about_to_be_replaced(client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path) -> None:
    """Whoever takes a run's name up has its lock: its process, though it lives, tells nothing any more that counts."""
    ended(tmp_path, flow_run, os.getpid(), "failed")
    record = RunFolder(tmp_path, flow_run.name).stored()
    settle.tell_before_it_is_forgotten(record, str(flow_run.id))  # a retry
    assert client.read_flow_run(flow_run.id).state_name == "Running"
    settle.tell_before_it_is_forgotten(record, str(UUID(int=1)))
    assert client.read_flow_run(flow_run.id).state_name == "Failed"
    client.delete_flow_run(flow_run.id)
    settle.tell_before_it_is_forgotten(record, str(UUID(int=1)))


def test_a_run_that_was_to_be_cancelled_is_called_cancelled(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int
) -> None:
    client.set_flow_run_state(flow_run.id, Cancelling())
    ended(tmp_path, flow_run, dead, "stopped")
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == "Cancelled"
