"""The Prefect server of a run: the one that PREFECT_API_URL names, else a persistent local one in the workspace.

The local server keeps its SQLite database in `<workspace>/prefect/`, listens on loopback only, and serves every run of the
workspace that is going on: each holds a shared lock on `users.lock`. It stands behind the shim (`launch/shim.py`), which ends
it when nobody holds that lock any more; the kernel drops the lock of a process however it dies. Prefect's ephemeral server
is never used: it is started anew by every process, and gives up after 20 seconds on a busy machine.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from flows.launch.process import shim_command
from flows.records.flock import is_locked, locked
from flows.records.server_home import server_home
from flows.server.asking import answers, is_here, is_of, keeps_out, what_is_wrong_with

START_SECONDS = 180.0  # a fresh database takes 12 s to set up, three times that on a busy machine
CLOSED_SECONDS = 15.0
LOOK_SECONDS, MOST_SECONDS = 1.0, 60.0  # between two looks whether it lives, and at most where it does not start again
USUAL_PORT = 4200
UI_FILES = "ui"  # in the server's home: what browsers get; by default Prefect writes these into its own package
UI_ROOT = Path(UI_FILES, "v1")  # of these, what is at the root of the address; those of v2 are below it
REPORTS = "reports"  # there: copies of the runs' reports, which are handed out without a login

# Of our environment, what the server needs. No token in particular: what it has, its API can be asked for.
ALLOWED = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
SERVER_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"  # whom a server lets in; PREFECT_API_AUTH_STRING is its clients'


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


def own_login(ours: Mapping[str, str]) -> str | None:
    """The user:password of the workspace's own server, where the person wants one: by either of Prefect's names for it, in the
    environment, or in the current folder's `.env`, which Prefect reads as well.

    Raises:
        NoServer: that file cannot be read.
    """
    from dotenv import dotenv_values  # Prefect's own reader of it

    try:
        said = {**dotenv_values(".env"), **ours}
    except (OSError, UnicodeDecodeError) as error:
        raise NoServer(f"{Path.cwd() / '.env'}, of which Prefect's settings are read, cannot be: {error}") from None
    return said.get(SERVER_LOGIN) or said.get("PREFECT_API_AUTH_STRING") or None


def client_environment(workspace: Path, server: Server, ours: Mapping[str, str]) -> dict[str, str]:
    """Settings for the process that runs the flow; to be set before Prefect is imported."""
    settings = {
        "PREFECT_API_URL": server.api,
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(server_home(workspace) / "results"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "DO_NOT_TRACK": "1",
    }
    if server.pid is not None:  # with a server of somebody else, the person's own profile holds, its login in particular
        settings["PREFECT_HOME"] = str(server_home(workspace))
        if login := own_login(ours):
            settings["PREFECT_API_AUTH_STRING"] = login
    return settings | (_past_proxies(ours) if is_here(server.api) else {})


def _past_proxies(ours: Mapping[str, str]) -> dict[str, str]:
    """What keeps a network's proxy out of the way to this machine's own ports, beside the hosts that the person has there.

    Both spellings: programs differ in which one they read, and in whether the other then still counts.
    """

    def told(*names: str) -> str:
        given = next((ours[name] for name in names if ours.get(name)), "")
        hosts = [host.strip() for host in given.split(",") if host.strip()]
        return given if "*" in hosts else ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))  # * is all, if alone

    return {"NO_PROXY": told("NO_PROXY", "no_proxy"), "no_proxy": told("no_proxy", "NO_PROXY")}


def connect(workspace: Path, server: Server, *, module: str) -> None:
    """Have this process talk to a server, and load a module of ours with Prefect, while the server starts: both take long."""
    os.environ.update(client_environment(workspace, server, os.environ))
    import_module(module)
    import_module("prefect.context").refresh_global_settings_context()  # the second time, the address is another


def server_environment(home: Path, port: int, ours: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of the local server."""
    settings = {name: value for name, value in ours.items() if name in ALLOWED or name.startswith("LC_")}
    if login := own_login(ours):
        settings[SERVER_LOGIN] = login
    return settings | {
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
    address. `meanwhile` is called before ours answers, and once more where another server took its port and it is started anew;
    for the named one when it has answered.

    Raises:
        NoServer: the named one does not answer or refuses us, or the local one does not start.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        os.environ["DO_NOT_TRACK"] = "1"  # before Prefect is imported, which reports that
        if told := what_is_wrong_with(named):
            raise NoServer(told)
        meanwhile(Server(api=named))
        yield Server(api=named)
        return
    home = server_home(workspace)
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)  # the database and the results are for the person alone
    with locked(home / "users.lock", fcntl.LOCK_SH):  # waits for a server that is ending
        server = _own(home, keep, say)
        meanwhile(server)
        while not _wait_for(server, home, threading.Event()):
            say(f"another server has taken {server.page} meanwhile")
            server = _own(home, keep, say)
            meanwhile(server)
        with _revived(server, home, keep, say):
            yield server


@contextlib.contextmanager
def kept_alive(*, revives: bool) -> Iterator[tuple[int, ...]]:
    """Keep the local server that Prefect's settings of this process name for as long as this lasts, where it is a local one.

    A run of a runner outlives a runner that is killed, and so must its server. Yields the descriptor of the lock, which other
    processes can inherit.

    Args:
        revives: nobody else in this process keeps it: it is started again should it die, and kept until the process ends, which
            tells Prefect how its run ended after this.
    """
    home = Path(os.environ.get("PREFECT_HOME", "/nowhere"))
    server = _running(home)
    if server is None or server.api != os.environ.get("PREFECT_API_URL"):
        yield ()
        return
    with (
        locked(home / "users.lock", fcntl.LOCK_SH) as descriptor,
        _revived(server, home, False, lambda told: None) if revives else contextlib.nullcontext(),
    ):
        if revives:
            os.dup(descriptor)  # never closed
        yield (descriptor,)


@contextlib.contextmanager
def _revived(server: Server, home: Path, keep: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Start our server again whenever it has died, while this lasts: runs find it where it was."""
    ended = threading.Event()
    port = int(server.api.removesuffix("/api").rpartition(":")[2])

    def look() -> None:
        pause, told = LOOK_SECONDS, ""
        while not ended.wait(pause):
            if is_locked(home / "server.lock"):
                continue
            try:
                with locked(home / "start.lock"):
                    if not is_locked(home / "server.lock"):
                        if not told:
                            say("the Prefect server died")
                        _start(home, (lambda text: None) if told else say, port)
                        _keep(home, keep)
                if not _wait_for(server, home, ended):
                    say(f"its port, {port}, is another program's now: nothing is shown until the next start")
                    return
            except (NoServer, OSError) as error:
                if not told:
                    say(f"{error}. It is tried again from time to time")
                told, pause = str(error), min(2 * pause, MOST_SECONDS)
            else:
                pause, told = LOOK_SECONDS, ""

    thread = threading.Thread(target=look, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def still_used(workspace: Path) -> Server | None:
    """The workspace's server, if it goes on when this process has left it: it was asked to stay, or others use it."""
    home = server_home(workspace)
    try:
        with locked(home / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            is_used = False
    except BlockingIOError:
        is_used = not is_locked(home / "users.lock")  # the shim of one that ends has it for itself
    return _running(home) if is_used or is_kept(workspace) else None


def is_kept(workspace: Path) -> bool:
    """Whether the workspace's server was asked to stay, by this run or by another."""
    return (server_home(workspace) / "server.keep").exists()


def _running(home: Path) -> Server | None:
    """The local server that some run started, if it still runs: its shim inherited a lock, which lasts as long as the shim."""
    if not is_locked(home / "server.lock"):
        return None
    known = json.loads((home / "server.json").read_text())
    return Server(api=str(known["api"]), pid=int(known["pid"]))


def _start(home: Path, say: Callable[[str], None], port: int | None = None) -> Server:
    is_first = not (home / "prefect.db").exists()
    say(f"starting a Prefect server in the workspace{' (the first time takes longer)' if is_first else ''} …")
    if port is None:
        port = _free_port()
        if port != USUAL_PORT:
            say(f"port {USUAL_PORT} is taken: the UI will be at http://127.0.0.1:{port}")
    login = own_login(os.environ)
    if login is not None:
        shutil.rmtree(home / UI_ROOT / REPORTS, ignore_errors=True)  # of the time when everybody was let in
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    options = ["--while-used", str(home / "users.lock"), "--keep", str(home / "server.keep")]
    with _log(home).open("wb") as log, locked(home / "server.lock") as alive:
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
        draft.write_text(json.dumps({"api": server.api, "pid": process.pid, "login": _login_mark(login)}))
        draft.replace(home / "server.json")
    threading.Thread(target=process.wait, name="server's end", daemon=True).start()  # it may outlive us
    return server


def _own(home: Path, keep: bool, say: Callable[[str], None]) -> Server:
    """The workspace's server: the one that another run started, else a new one. It may not answer yet."""
    with locked(home / "start.lock"):
        server = _running(home)
        if server is None:
            (home / "server.keep").unlink(missing_ok=True)  # of one that was killed
            server = _start(home, say)
        elif not _is_marked(home, own_login(os.environ)):  # nobody may believe an open one protected, or wait for a closed one
            raise NoServer(
                f"the workspace's Prefect server was started with another login than this environment has, or with none: make "
                f"PREFECT_API_AUTH_STRING the same, or stop the server (kill {server.pid}) to have it started with yours"
            )
        _keep(home, keep)
    return server


def _login_mark(login: str | None, salt: str | None = None) -> str | None:
    """What tells a login from another, and not what it is."""
    if login is None:
        return None
    salt = salt or secrets.token_hex(16)
    return f"{salt} {hashlib.pbkdf2_hmac('sha256', login.encode(), salt.encode(), 100_000).hex()}"


def _is_marked(home: Path, login: str | None) -> bool:
    """Whether our server was started with this login."""
    mark = json.loads((home / "server.json").read_text()).get("login")
    if mark is None or login is None:
        return mark is login
    return bool(mark == _login_mark(login, salt=mark.partition(" ")[0]))


def _keep(home: Path, keep: bool) -> None:
    """Ask a server to stay after its last user. Its shim forgets it with the server."""
    if keep:
        (home / "server.keep").touch()


def _wait_for(server: Server, home: Path, ended: threading.Event) -> bool:
    """Wait until our server answers, or nobody wants it any more; False when it ended because another server took its port.

    Raises:
        NoServer: it ended for another reason, or does not answer.
    """
    begun, login = time.monotonic(), own_login(os.environ)
    closed = None  # since when it keeps us out
    while not is_of(server.api, home, login):
        is_gone = not is_locked(home / "server.lock")
        if is_gone and answers(server.api):
            return False
        if is_gone or time.monotonic() > begun + START_SECONDS:
            what = "ended" if is_gone else f"did not answer within {START_SECONDS:.0f} s"
            raise NoServer(f"the local Prefect server {what}: {_last_line(_log(home))}. Its log: {_log(home)}")
        closed = (closed or time.monotonic()) if keeps_out(server.api, login) else None
        # Ours, which reads files that we do not, such as prefect.toml; another's with our port would have ended ours by now.
        if closed is not None and time.monotonic() >= closed + CLOSED_SECONDS:
            raise NoServer(
                "the local Prefect server wants another login than this environment has, one that a file "
                "of Prefect's settings names: export PREFECT_API_AUTH_STRING=user:password, the same"
            )
        if ended.wait(0.1):
            break
    return True


def _log(home: Path) -> Path:
    return home / "server.log"


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
