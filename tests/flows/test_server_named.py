"""A server that PREFECT_API_URL names and that is of no use: told at once, or after one wait, before all else is loaded."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.server import asking
from flows.server.local import NoServer, Server, serving


class Busy(BaseHTTPRequestHandler):
    """What a gateway says whose server is away: Prefect's client would ask again and again."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
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
    monkeypatch.setattr(Busy, "asked", [], raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which leads nowhere, this machine's own ports in particular
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        told = asking.what_is_wrong_with(f"http://127.0.0.1:{gateway.server_port}/api")
        gateway.shutdown()
    assert told is not None
    assert "answers with status 503: no Prefect server is there" in told
    assert Busy.asked == ["/api/health"]


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
