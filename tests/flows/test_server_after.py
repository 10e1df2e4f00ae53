"""What becomes of the workspace's server when a run has left it, and what the person is told of that; its port, when taken."""

import fcntl
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.commands import run
from flows.records.flock import locked
from flows.records.run_record import RunFolder, RunRecord, now
from flows.server import local as servers

PAGE = "http://127.0.0.1:9/runs/flow-run/x"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """Of a run that is done, in a workspace whose server runs."""
    home = tmp_path / "prefect"
    folder = RunFolder(tmp_path, "calm-heron")
    folder.path.mkdir(parents=True)
    folder.write(RunRecord(name="calm-heron", config={}, cwd="/", pid=1, started=now(), state="done", page=PAGE))
    with locked(home / "server.lock"):
        (home / "server.json").write_text(json.dumps({"api": "http://127.0.0.1:9/api", "pid": 77}))
        yield folder


def told_of(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> str:
    run._say_whether_it_ends(folder, " --workspace ws")
    return capsys.readouterr().err


def test_it_is_told_whether_the_server_ends(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    ends = "UI:         its server ended with the run; finetune rerun calm-heron --workspace ws --keep-server leaves it on\n"
    users = folder.workspace / "prefect" / "users.lock"
    assert told_of(folder, capsys) == ends
    with locked(users, fcntl.LOCK_SH):  # `finetune ui`, or another run
        assert told_of(folder, capsys) == f"UI:         {PAGE}\n"
    with locked(users):  # its shim, which ends it
        assert told_of(folder, capsys) == ends
    (folder.workspace / "prefect" / "server.keep").touch()
    assert told_of(folder, capsys) == "the Prefect server stays at http://127.0.0.1:9; to stop it: kill 77\n"


def test_a_port_that_is_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "shim_command", lambda *args, **kwargs: ["true"])
    (tmp_path / "prefect.db").touch()
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(servers, "USUAL_PORT", port := taken.getsockname()[1])
        server = servers._start(tmp_path, said.append)
    starting = "starting a Prefect server in the workspace …"
    assert said == [starting, f"port {port} is taken: the UI will be at {server.page}"]
    servers._start(tmp_path, said.append, 9)  # one that died comes back where it was
    assert said[2:] == [starting]
