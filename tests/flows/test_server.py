"""The local server: shared by the runs of a workspace, gone when nobody uses it, clear when it does not start."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from processes import children, free_port, wait_until

from flows.launch.environment import hub_environment, stage_environment
from flows.records.flock import is_locked, locked
from flows.server import asking
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


def test_shared_while_used_and_gone_with_the_last_user(
    tmp_path: Path, put_database: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "prefect"
    put_database(tmp_path)
    put_database(tmp_path / "other")
    keeper = use(tmp_path, "keep")
    api = api_of(keeper)
    stays = servers.still_used(tmp_path)
    assert stays is not None
    assert stays.api == api
    page = api.replace("/api", "/runs/flow-run/x")
    assert asking.page_is_lost(page, "00000000-0000-0000-0000-000000000000")  # it answers, but knows nothing of that run
    assert (home / "prefect.db-wal").exists()
    assert home.stat().st_mode & 0o777 == 0o700
    keeper.communicate()
    wait_for_looks(home)  # it was asked to stay
    assert asking.answers(api)

    first, second = use(tmp_path), use(tmp_path)
    assert api_of(first) == api_of(second) == api
    (home / "server.keep").unlink()
    first.communicate()
    wait_for_looks(home)  # there is a user left
    assert asking.answers(api)

    # Another workspace's server that chose the same port at the same moment loses it, and gets another.
    ports = [int(api.removesuffix("/api").rpartition(":")[2]), free_port()]
    monkeypatch.setattr(servers, "_free_port", lambda: ports.pop(0))
    told: list[Server] = []
    said: list[str] = []
    with serving(tmp_path / "other", say=said.append, meanwhile=told.append) as other:
        assert [server.api for server in told] == [api, other.api]
        start, changed = "starting a Prefect server in the workspace …", f"another server has taken {told[0].page} meanwhile"
        assert [line for line in said if not line.startswith("port 4200 is taken: ")] == [start, changed, start]
        assert asking.is_of(other.api, tmp_path / "other" / "prefect")
    assert asking.answers(api)

    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    wait_until(lambda: not is_locked(home / "server.lock"))
    assert not asking.answers(api)


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "print('no such column'); raise SystemExit(3)"]
    monkeypatch.setattr(servers, "shim_command", lambda *args, **kwargs: broken)
    with pytest.raises(NoServer) as caught, serving(tmp_path, say=lambda text: None):
        pass
    log = tmp_path / "prefect" / "server.log"
    assert str(caught.value) == f"the local Prefect server ended: no such column. Its log: {log}"


def test_the_server_gets_no_secrets(tmp_path: Path) -> None:
    ours = {"HF_TOKEN": "x", "PREFECT_API_KEY": "x", "PATH": "/bin", "HOME": "/h"}
    environment = servers.server_environment(tmp_path, 4200, ours)
    assert "x" not in environment.values()
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_HOME"] == str(tmp_path)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_network_s_proxy_is_not_asked_for_this_machine(
    is_ours: bool, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    named = server if is_ours else Server(server.api)
    for name, value in (proxies | servers.client_environment(tmp_path, named, proxies)).items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        client.hello().raise_for_status()


def test_a_network_s_proxy_is_asked_for_other_machines(tmp_path: Path) -> None:
    proxies = {"http_proxy": "http://127.0.0.1:9"}
    assert "no_proxy" not in servers.client_environment(tmp_path, Server("http://prefect.corp/api"), proxies)


@pytest.mark.parametrize(
    ("ours", "upper", "lower"),
    [
        ({}, "127.0.0.1,localhost", "127.0.0.1,localhost"),
        ({"NO_PROXY": "corp, .lan"}, "corp,.lan,127.0.0.1,localhost", "corp,.lan,127.0.0.1,localhost"),
        ({"NO_PROXY": "corp", "no_proxy": "localhost,lan"}, "corp,127.0.0.1,localhost", "localhost,lan,127.0.0.1"),
        ({"no_proxy": "*"}, "*", "*"),
    ],
)
def test_what_goes_past_a_proxy_already_still_does(tmp_path: Path, ours: dict[str, str], upper: str, lower: str) -> None:
    """In the stages that talk to the Hub, too; and asked twice, it is the same."""
    here = Server("http://127.0.0.1:4200/api", 1)
    ours = ours | servers.client_environment(tmp_path, here, ours)
    assert ours == ours | servers.client_environment(tmp_path, here, ours)
    assert hub_environment(ours) == {"NO_PROXY": upper, "no_proxy": lower}


def test_the_workspace_s_own_server_with_a_password(
    tmp_path: Path, put_database: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said in `.env`, as for docker-compose.yml, or in the environment: it is the same."""
    put_database(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text("PREFECT_API_AUTH_STRING=me:from-a-file\n")
    reports = tmp_path / "prefect" / servers.UI_ROOT / servers.REPORTS
    reports.mkdir(parents=True)
    with serving(tmp_path, say=lambda text: None) as server:
        assert server.pid is not None
        for pid in (server.pid, *children(server.pid)):
            assert b"from-a-file" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert not reports.exists(), "without the password they can be read"
        assert "from-a-file" not in (tmp_path / "prefect" / "server.json").read_text()
        assert not asking.is_of(server.api, tmp_path / "prefect"), "nobody else may ask it"
        environment = servers.client_environment(tmp_path, server, {})
        assert environment["PREFECT_API_AUTH_STRING"] == "me:from-a-file"
        assert "me:from-a-file" not in stage_environment(environment, talks_to_hub=True).values()
        for login, is_let_in in ((environment["PREFECT_API_AUTH_STRING"], True), (None, False)):
            with temporary_settings({PREFECT_API_AUTH_STRING: login}):
                assert (asking.what_is_wrong_with(server.api) is None) is is_let_in

        monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:from-a-file")
        with serving(tmp_path) as again:
            assert again == server
        monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:another")
        with (
            pytest.raises(NoServer, match=rf"with another login .* PREFECT_API_AUTH_STRING .*kill {server.pid}"),
            serving(tmp_path),
        ):
            pass


def test_settings_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"PREFECT_API_AUTH_STRING=\xff\n")
    with (
        pytest.raises(NoServer, match=rf"^{tmp_path}/.env, of which Prefect's settings are read, cannot be: "),
        serving(tmp_path),
    ):
        pass


def test_a_server_that_dies_and_does_not_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and tried less and less often; it stays as asked for when it comes back."""
    home = tmp_path / "prefect"
    home.mkdir()
    said: list[str] = []
    starts: list[Path] = []
    tried, back = threading.Event(), threading.Event()

    def start(home: Path, say: Callable[[str], None], port: int | None) -> None:
        say("starting")
        starts.append(home)
        if len(starts) < 4:
            raise PermissionError("no more processes")
        tried.set()

    monkeypatch.setattr(servers, "_start", start)
    monkeypatch.setattr(servers, "_wait_for", lambda server, home, ended: back.set() or True)
    monkeypatch.setattr(servers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(servers, "MOST_SECONDS", 0.02)
    with servers._revived(Server("http://127.0.0.1:9/api", 1), home, True, said.append):
        assert tried.wait(60)
        assert back.wait(60)
    assert said[:3] == ["the Prefect server died", "starting", "no more processes. It is tried again from time to time"]
    assert said[3:4] in ([], ["the Prefect server died"]), "nothing more is said until it died anew"
    assert (home / "server.keep").exists()


def test_a_run_of_a_runner_starts_its_server_again_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runner may have been killed: nobody else would."""
    api = "http://127.0.0.1:9/api"
    (tmp_path / "server.json").write_text(json.dumps({"api": api, "pid": 1}))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", api)
    monkeypatch.setattr(servers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(servers, "_wait_for", lambda server, home, ended: True)
    started = threading.Event()
    monkeypatch.setattr(servers, "_start", lambda home, say, port: started.set())
    with ExitStack() as server:
        server.enter_context(locked(tmp_path / "server.lock"))
        with servers.kept_alive(revives=True) as holds:
            assert len(holds) == 1
            assert is_locked(tmp_path / "server.lock")
            server.close()
            assert started.wait(60)
    with pytest.raises(BlockingIOError), locked(tmp_path / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
        pytest.fail("the process has yet to tell the server how its run ended")
    with servers.kept_alive(revives=True) as holds:
        assert holds == (), "there is none to keep"
