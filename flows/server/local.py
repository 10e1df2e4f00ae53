"""The Prefect server of a run: the one that PREFECT_API_URL names, else a persistent local one in the workspace.

The local server keeps its SQLite database in `<workspace>/prefect/`, listens on loopback only, and serves every run of the
workspace that is going on: each holds a shared lock on `users.lock`. It stands behind the shim (`launch/shim.py`), which ends
it when nobody holds that lock any more; the kernel drops the lock of a process however it dies. Prefect's ephemeral server
is never used: it is started anew by every process, and gives up after 20 seconds on a busy machine.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.launch.process import shim_command

START_SECONDS = 180.0  # a fresh database takes 12 s to set up, three times that on a busy machine
USUAL_PORT = 4200
UI_FILES = "ui"  # in the server's home: what browsers get; by default Prefect writes these into its own package

# Of our environment, what the server needs. No token in particular: what it has, its API can be asked for.
ALLOWED = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    api: str  # URL
    pid: int | None = None  # of its shim, where it is ours: SIGTERM stops it

    @property
    def page(self) -> str:
        """Address for the browser."""
        return self.api.removesuffix("/api")


class NoServer(RuntimeError):
    """There is no server, and none could be started. The message says what to do."""


def client_environment(workspace: Path, server: Server) -> dict[str, str]:
    """Settings of Prefect for the process that runs the flow; to be set before Prefect is imported."""
    settings = {
        "PREFECT_API_URL": server.api,
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(workspace / "prefect" / "results"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "DO_NOT_TRACK": "1",
    }
    if server.pid is not None:  # with a server of somebody else, the person's own profile holds, its login in particular
        settings["PREFECT_HOME"] = str(workspace / "prefect")
    return settings


def server_environment(home: Path, port: int, ours: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of the local server."""
    return {name: value for name, value in ours.items() if name in ALLOWED or name.startswith("LC_")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / UI_FILES),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
    }


@contextlib.contextmanager
def serving(
    workspace: Path,
    *,
    keep: bool = False,
    say: Callable[[str], None] = print,
    meanwhile: Callable[[Server], None] = lambda server: None,
) -> Iterator[Server]:
    """A server for as long as this lasts; longer with `keep`, if it is ours. Should ours die, it is started again, at its
    address. `meanwhile` is called before it answers, and once more where another server took its port and it is started anew.

    Raises:
        NoServer: the named one does not answer, or the local one does not start.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        if not _answers(named):
            raise NoServer(
                f"no Prefect server answers at PREFECT_API_URL={named}. "
                "Start it (prefect server start), or unset PREFECT_API_URL to use one in the workspace"
            )
        meanwhile(Server(api=named))
        yield Server(api=named)
        return
    home = workspace / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)  # the database and the results are for the person alone
    with _locked(home / "users.lock", fcntl.LOCK_SH):  # waits for a server that is ending
        server = _own(home, keep, say)
        meanwhile(server)
        while not _wait_for(server, home):
            server = _own(home, keep, say)
            meanwhile(server)
        with _revived(server, home, say):
            yield server


@contextlib.contextmanager
def kept_alive() -> Iterator[tuple[int, ...]]:
    """Keep the local server that Prefect's settings of this process name for as long as this lasts, where it is a local one.

    A run of a runner outlives a runner that is killed, and so must its server. Yields the descriptor of the lock, which other
    processes can inherit.
    """
    home = Path(os.environ.get("PREFECT_HOME", "/nowhere"))
    server = _running(home) if (home / "server.json").exists() else None
    if server is None or server.api != os.environ.get("PREFECT_API_URL"):
        yield ()
        return
    with _locked(home / "users.lock", fcntl.LOCK_SH) as descriptor:
        yield (descriptor,)


@contextlib.contextmanager
def _revived(server: Server, home: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Start our server again whenever it has died, while this lasts: runs find it where it was."""
    ended = threading.Event()
    port = int(server.api.removesuffix("/api").rpartition(":")[2])

    def look() -> None:
        while not ended.wait(1.0):
            if _is_alive(home):
                continue
            with _locked(home / "start.lock", fcntl.LOCK_EX):
                if not _is_alive(home):
                    say("the Prefect server died")
                    _start(home, say, port)
            with contextlib.suppress(NoServer):
                if not _wait_for(server, home):
                    say(f"its port, {port}, is another program's now: nothing is shown until the next start")
                    return

    thread = threading.Thread(target=look, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stays(workspace: Path) -> bool:
    """Whether the workspace's server was asked to stay, by this run or by another."""
    return (workspace / "prefect" / "server.keep").exists()


def page_is_lost(page: str | None, flow_run_id: str | None) -> bool:
    """Whether a run's page was on a server of this machine that does not show it any more.

    Only loopback is asked, which answers or refuses at once; servers elsewhere do not end with a run.
    """
    at = re.match(r"http://(127\.0\.0\.1|localhost):\d+", page or "")
    return at is not None and _get(f"{at[0]}/api", f"flow_runs/{flow_run_id}") is None


@contextlib.contextmanager
def _locked(file: Path, how: int) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_alive(home: Path) -> bool:
    """Whether the workspace's server runs: its shim inherited a lock, which lasts as long as the shim."""
    try:
        with _locked(home / "server.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def _running(home: Path) -> Server | None:
    """The local server that another run started, if it still runs."""
    if not _is_alive(home):
        return None
    known = json.loads((home / "server.json").read_text())
    return Server(api=str(known["api"]), pid=int(known["pid"]))


def _start(home: Path, say: Callable[[str], None], port: int | None = None) -> Server:
    is_first = not (home / "prefect.db").exists()
    say(f"starting a Prefect server in the workspace{' (the first time takes longer)' if is_first else ''} …")
    (home / "server.keep").unlink(missing_ok=True)
    port = port or _free_port()
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    options = ["--while-used", str(home / "users.lock"), "--keep", str(home / "server.keep")]
    with _log(home).open("wb") as log, _locked(home / "server.lock", fcntl.LOCK_EX) as alive:
        process = subprocess.Popen(
            shim_command(command, grace=15, options=options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=server_environment(home, port, os.environ),
            start_new_session=True,
            pass_fds=[alive],
        )
        server = Server(api=f"http://127.0.0.1:{port}/api", pid=process.pid)
        draft = home / "server.json.new"  # a reader sees the old one or the new one
        draft.write_text(json.dumps({"api": server.api, "pid": process.pid}))
        draft.replace(home / "server.json")
    process.returncode = 0  # it outlives this object on purpose; its end is the shim's business
    return server


def _own(home: Path, keep: bool, say: Callable[[str], None]) -> Server:
    """The workspace's server: the one that another run started, else a new one. It may not answer yet."""
    with _locked(home / "start.lock", fcntl.LOCK_EX):
        server = _running(home) or _start(home, say)
        if keep:
            (home / "server.keep").touch()
    return server


def _wait_for(server: Server, home: Path) -> bool:
    """Wait until our server answers; False when it ended because another server took its port meanwhile.

    Raises:
        NoServer: it ended for another reason, or does not answer.
    """
    deadline = time.monotonic() + START_SECONDS
    while not _is_of(server.api, home):
        ended = not _is_alive(home)
        if ended and _answers(server.api):
            return False
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"did not answer within {START_SECONDS:.0f} s"
            raise NoServer(f"the local Prefect server {what}: {_last_line(_log(home))}. Its log: {_log(home)}")
        time.sleep(0.1)
    return True


def _log(home: Path) -> Path:
    return home / "server.log"


def _answers(api: str) -> bool:
    return _get(api, "health") is not None


def _is_of(api: str, home: Path) -> bool:
    """Whether the server that answers is this workspace's: two that start at once may have chosen the same port."""
    settings = _get(api, "admin/settings")
    return settings is not None and json.loads(settings)["home"] == str(home)


def _get(api: str, path: str) -> bytes | None:
    """What a server answers to a request, or None where it does not."""
    try:
        is_here = "127.0.0.1" in api or "localhost" in api
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({})) if is_here else None
        request = f"{api.rstrip('/')}/{path}"
        with opener.open(request, timeout=5) if opener else urllib.request.urlopen(request, timeout=5) as response:
            return bytes(response.read()) if response.status == 200 else None
    except (OSError, urllib.error.URLError, ValueError):
        return None


def _free_port() -> int:
    """Prefect's usual port, so that a page's address stays good, or any other where that is taken."""
    for port in (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise NoServer("no free port on 127.0.0.1")


def _last_line(log_file: Path) -> str:
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if not line[0].isspace()]  # the others belong to a traceback
    return said[-1] if said else "it said nothing"
