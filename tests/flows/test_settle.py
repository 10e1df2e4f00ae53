"""What Prefect is told of a run whose process is gone, by whoever settles it: another run, a runner, the run's watcher."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from fake_stages import config
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Running, Scheduled

from flows import tasks
from flows.finetune import finetune
from flows.launch import choose
from flows.records.run_record import RunFolder, RunRecord, all_runs, now
from flows.running import settle
from flows.server.local import Server


@pytest.fixture
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def flow_run(client: SyncPrefectClient, tmp_path: Path) -> FlowRun:
    """One that Prefect believes to go on. Its parameters name no workspace: others settle the runs of this server, too."""
    flow_run = client.create_flow_run(finetune, name="brisk-otter", state=Running())
    return client.read_flow_run(flow_run.id)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def ended(workspace: Path, flow_run: FlowRun, pid: int, state: str, machine: str = socket.gethostname()) -> None:
    """The record of a run that has just ended, before it told Prefect."""
    folder = RunFolder(workspace, flow_run.name)
    folder.path.mkdir(parents=True)
    record = {"name": flow_run.name, "config": {}, "cwd": "/", "pid": pid, "machine": machine, "state": state}
    times = {"started": now(), "finished": None if state == "running" else now()}
    folder.write(RunRecord(**record, **times, error="stopped", flow_run_id=str(flow_run.id), attempt=flow_run.run_count))


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
    monkeypatch.setattr(settle, "_going_on", lambda client: [client.read_flow_run(flow_run.id)])  # of other tests' none
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == "Completed"


def test_a_process_of_another_machine_is_not_looked_for_here(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int
) -> None:
    """Of a container, or on a shared disk."""
    ended(tmp_path, flow_run, dead, "done", machine="elsewhere")
    settle.reconcile([tmp_path])
    assert client.read_flow_run(flow_run.id).state_name == "Running"


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


def test_a_run_that_died_before_it_had_a_record_leaves_no_task(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path
) -> None:
    """As where another took its name up, and could not reach Prefect."""
    task = client.create_task_run(tasks.train, flow_run.id, "0", name="train", state=Running()).id
    settle.main(tmp_path, flow_run.name, str(flow_run.id), flow_run.run_count)
    assert client.read_task_run(task).state_name == "Crashed"


def test_a_retry_that_waits_for_its_runner_is_left_alone(client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path) -> None:
    client.set_flow_run_state(flow_run.id, Scheduled(), force=True)
    settle.main(tmp_path, flow_run.name, str(flow_run.id), flow_run.run_count)
    assert client.read_flow_run(flow_run.id).state_name == "Scheduled"


def test_a_crash_that_cannot_be_written_down(
    client: SyncPrefectClient, flow_run: FlowRun, tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or another person's folder: Prefect is told all the same."""

    def refuse(folder: RunFolder) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ended(tmp_path, flow_run, dead, "running")
    monkeypatch.setattr(settle, "_mark", refuse)
    settle.main(tmp_path, flow_run.name, str(flow_run.id), flow_run.run_count)
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


def test_what_a_watcher_does_while_the_server_is_away(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record, the report and the containers are of this machine: they wait for nobody."""
    cleaned: list[Path] = []
    monkeypatch.setattr(choose, "remove_left", lambda config, workspace: cleaned.append(workspace))
    monkeypatch.setattr(settle, "AGAIN", (0.0, 0.0))
    folder = RunFolder(tmp_path, "dead")
    folder.path.mkdir(parents=True)
    asked = config(tmp_path).model_dump(mode="json")
    folder.write(RunRecord(name="dead", config=asked, cwd="/", pid=1, started=now(), flow_run_id=str(UUID(int=1))))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        settle.main(tmp_path, "dead", str(UUID(int=1)), 1)
    assert ([record.state for record in all_runs(tmp_path)], cleaned) == (["crashed"], [tmp_path])
    assert "its process is gone" in folder.report.read_text()


def test_runs_that_cannot_be_settled_keep_no_other_from_it(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of another person, which may be read and not written. Whoever tests may write everywhere."""
    monkeypatch.setattr(settle, "_going_on", lambda client: [])
    theirs, ours = RunFolder(tmp_path, "theirs"), RunFolder(tmp_path, "ours")
    for folder in (ours, theirs):  # the newest one is looked at first
        folder.path.mkdir(parents=True)
        folder.write(RunRecord(name=folder.name, config={}, cwd="/", pid=1, started=now(), flow_run_id=str(UUID(int=1))))
    (theirs.path / ".lock").mkdir()
    unreadable = tmp_path / ("x" * 300)
    troubles: list[str] = []
    assert settle.reconcile([unreadable, tmp_path], troubles.append) == ["ours"]
    assert [record.finished is not None for record in all_runs(tmp_path) if record.name == "ours"] == [True]
    assert sum(str(theirs.path) in told for told in troubles) == 1
    assert {told.partition(": ")[0] for told in troubles} == {
        f"the runs of {unreadable} cannot be read, and are left as they are",
        f"the run {theirs.path} seems to have crashed; only who may write there can mark it",
    }
    settle.main(tmp_path, "theirs", str(UUID(int=1)), 1)  # its watcher: it does what is left to do


class EndsMeanwhile(RunFolder):
    """A run that ends, and is done, between a look at it and the moment in which one has its lock."""

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            if (record := self.stored()) is not None:
                self.write(record.model_copy(update={"state": "done", "finished": now()}))
            yield


def test_a_run_that_ended_meanwhile_is_not_marked(tmp_path: Path) -> None:
    folder = EndsMeanwhile(tmp_path, "run")
    folder.path.mkdir(parents=True)
    folder.write(RunRecord(name="run", config={}, cwd="/", pid=1, started=now()))
    assert not settle._mark(folder)
    assert [record.state for record in all_runs(tmp_path)] == ["done"]
