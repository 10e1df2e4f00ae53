"""The local server: shared by the runs of a workspace, gone when nobody uses it, clear when it does not start."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import wait_until

from flows.server import local as servers
from flows.server.local import NoServer, Server, serving

USE = """
import sys
from pathlib import Path
from flows.server.local import serving
with serving(Path(sys.argv[1]), keep=len(sys.argv) > 2, say=lambda text: None) as server:
    print(server.api, flush=True)
    sys.stdin.read()
"""


def use(workspace: Path, *keep: str) -> subprocess.Popen[str]:
    """A process that uses the workspace's server until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", USE, str(workspace), *keep], cwd=Path(__file__).parents[2], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def api_of(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def wait_for_looks(home: Path) -> None:
    """Until the shim has looked twice from now on whether anybody uses its server: it sleeps before each look."""
    pid = json.loads((home / "server.json").read_text())["pid"]

    def sleeps() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = sleeps()
    wait_until(lambda: sleeps() >= before + 3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_shared_while_used_and_gone_with_the_last_user(
    tmp_path: Path, put_database: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "prefect"
    put_database(tmp_path)
    put_database(tmp_path / "other")
    keeper = use(tmp_path, "keep")
    api = api_of(keeper)
    assert servers.stays(tmp_path)
    page = api.replace("/api", "/runs/flow-run/x")
    assert servers.page_is_lost(page, "00000000-0000-0000-0000-000000000000")  # it answers, but knows nothing of that run
    assert (home / "prefect.db-wal").exists()
    assert home.stat().st_mode & 0o777 == 0o700
    keeper.communicate()
    wait_for_looks(home)  # it was asked to stay
    assert servers._answers(api)

    first, second = use(tmp_path), use(tmp_path)
    assert api_of(first) == api_of(second) == api
    (home / "server.keep").unlink()
    first.communicate()
    wait_for_looks(home)  # there is a user left
    assert servers._answers(api)

    # Another workspace's server that chose the same port at the same moment loses it, and gets another.
    ports = [int(api.removesuffix("/api").rpartition(":")[2]), free_port()]
    monkeypatch.setattr(servers, "_free_port", lambda: ports.pop(0))
    told: list[Server] = []
    with serving(tmp_path / "other", say=lambda text: None, meanwhile=told.append) as other:
        assert [server.api for server in told] == [api, other.api]
        assert servers._is_of(other.api, tmp_path / "other" / "prefect")
    assert servers._answers(api)

    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    wait_until(lambda: not servers._is_alive(home))
    assert not servers._answers(api)


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "print('no such column'); raise SystemExit(3)"]
    monkeypatch.setattr(servers, "shim_command", lambda *args, **kwargs: broken)
    with pytest.raises(NoServer) as caught, serving(tmp_path, say=lambda text: None):
        pass
    log = tmp_path / "prefect" / "server.log"
    assert str(caught.value) == f"the local Prefect server ended: no such column. Its log: {log}"


def test_the_server_that_is_named(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.api)
    with serving(tmp_path) as named:
        assert named == Server(api=server.api)
    assert not (tmp_path / "prefect").exists()
    assert "PREFECT_HOME" not in servers.client_environment(tmp_path, named)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with (
        pytest.raises(NoServer, match=r"no Prefect server answers at PREFECT_API_URL=http://127\.0\.0\.1:9/api"),
        serving(tmp_path),
    ):
        pass


def test_the_server_gets_no_secrets(tmp_path: Path) -> None:
    ours = {"HF_TOKEN": "x", "PREFECT_API_KEY": "x", "PATH": "/bin", "HOME": "/h"}
    environment = servers.server_environment(tmp_path, 4200, ours)
    assert "x" not in environment.values()
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_HOME"] == str(tmp_path)
