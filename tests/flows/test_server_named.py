"""A server that PREFECT_API_URL names, and one of ours that wants another login: what is of no use is told at once, or after
one wait, before all else is loaded."""

import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from answering import Answer, answering
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

from flows.records.flock import locked
from flows.server import asking
from flows.server import local as servers
from flows.server.local import NoServer, Server, serving


def test_the_server_that_is_named(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.api)
    with serving(tmp_path) as named:
        assert named == Server(api=server.api)
    assert not (tmp_path / "prefect").exists()
    assert "PREFECT_HOME" not in servers.client_environment(tmp_path, named, {})
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with (
        pytest.raises(NoServer, match=r"no Prefect server answers at PREFECT_API_URL=http://127\.0\.0\.1:9/api"),
        serving(tmp_path),
    ):
        pass


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_one_that_never_answers(tmp_path: Path, silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    api = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
    monkeypatch.setenv("PREFECT_API_URL", api)
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 1.0)
    loaded: list[Server] = []
    with pytest.raises(NoServer) as caught, serving(tmp_path, meanwhile=loaded.append):
        pass
    assert str(caught.value) == (
        f"PREFECT_API_URL={api} does not answer within 1 s. See what is there, start it anew, or unset PREFECT_API_URL to use "
        "a server in the workspace"
    )
    assert loaded == []
    silent.setblocking(False)
    silent.accept()[0].close()
    with pytest.raises(BlockingIOError):
        silent.accept()  # it was not asked again


def test_one_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall: nobody takes the connection, and nobody refuses it."""
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 2.0)
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # as many as wait at its door; the next is left alone
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(full.getsockname())
        begun = time.monotonic()
        told = asking.what_is_wrong_with(f"http://127.0.0.1:{full.getsockname()[1]}/api")
    assert told is not None
    assert "does not answer within 2 s" in told
    assert time.monotonic() < begun + 4 * 2.0, "each of the client's four tries has its share"


def test_one_that_is_away_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gateway says whose server is away: Prefect's client would ask again and again."""
    asked: list[str] = []

    def busy(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(request.path)
        return 503, b""

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which leads nowhere, this machine's own ports in particular
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering(busy) as address:
        told = asking.what_is_wrong_with(f"{address}/api")
    assert told is not None
    assert "answers with status 503: no Prefect server is there" in told
    assert asked == ["/api/health"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [((200, b"<html>hello</html>"), "no JSON"), ((200, b"[]"), "something else"), ((404, b""), "status 404")],
)
def test_another_program_s_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, told: str) -> None:
    with answering(lambda asked: answer) as api:
        monkeypatch.setenv("PREFECT_API_URL", api)
        with pytest.raises(NoServer) as caught, serving(tmp_path):
            pass
        assert not asking.answers(api)
        assert not asking.is_of(api, tmp_path)
    assert str(caught.value) == (
        f"PREFECT_API_URL={api} answers with {told}: no Prefect server is there, whose address ends in /api as a rule"
    )


@pytest.mark.parametrize("api", ["http://127.0.0.1:42o0/api", "http://[::1/api", "127.0.0.1:4200/api"])
def test_what_is_no_address(api: str) -> None:
    told = asking.what_is_wrong_with(api)
    assert told is not None
    assert re.match(rf"PREFECT_API_URL={re.escape(api)} is no address \(.+\): set it to one such as http://", told)
    assert not asking.answers(api)


def test_a_program_that_speaks_otherwise(silent: socket.socket) -> None:
    """The port of a page that was, by now with another program: it has the page no more."""

    def answer() -> None:
        with silent.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"\x15\x03\x01\x00\x02\x02\x16 no HTTP\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    assert asking.page_is_lost(f"http://127.0.0.1:{silent.getsockname()[1]}/runs/flow-run/x", "x")
    thread.join()


def with_login(asked: BaseHTTPRequestHandler) -> Answer:
    """What a server with a password answers: whether it is there, to everybody; all else, to those who have it."""
    is_in = asked.headers.get("Authorization") == "Basic " + b64encode(b"admin:right").decode()
    return (200 if is_in or asked.path == "/api/health" else 401), b"true"


@pytest.fixture
def closed() -> Iterator[str]:
    """The address of a server with a password."""
    with answering(with_login) as address:
        yield f"{address}/api"


def test_a_server_with_a_password(tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", closed)
    refused = (
        f"the Prefect server at PREFECT_API_URL={closed} refuses this login: set PREFECT_API_AUTH_STRING to its user:password"
    )
    for login in (None, "admin:wrong"):
        with (
            temporary_settings({PREFECT_API_AUTH_STRING: login}),
            pytest.raises(NoServer, match=re.escape(refused)),
            serving(tmp_path),
        ):
            pass
    with temporary_settings({PREFECT_API_AUTH_STRING: "admin:right"}), serving(tmp_path) as server:
        assert server.api == closed
    assert not asking.page_is_lost(closed.replace("/api", "/runs/flow-run/x"), "x"), "nobody may look, it may well be there"


def test_a_password_that_only_the_server_knows(tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where prefect.toml names it, which Prefect's server reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "CLOSED_SECONDS", 0.0)
    for name in ("PREFECT_API_AUTH_STRING", servers.SERVER_LOGIN):
        monkeypatch.delenv(name, raising=False)
    with (
        locked(tmp_path / "server.lock"),
        pytest.raises(
            NoServer, match=r"wants another login than this .*: export PREFECT_API_AUTH_STRING=user:password, the same$"
        ),
    ):
        servers._wait_for(Server(closed), tmp_path, threading.Event())
