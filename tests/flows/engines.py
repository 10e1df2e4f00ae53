"""Stand-ins for Docker engines: one that only says what it is, and the client of one whose containers are sockets."""

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@contextlib.contextmanager
def engine_of(path: Path, *, api: str = "1.41") -> Iterator[None]:
    """An engine with this version of its API at a socket."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"ApiVersion": api, "Version": "1"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "a socket"

        def log_message(self, *told: Any) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink()


class SocketEngine:
    """A client whose containers say what a test says, at the other end of a socket; it notes what becomes of them."""

    def __init__(self, said: str = "") -> None:
        self.said, self.calls, self.labels = said, list[str](), dict[str, str]()
        self.containers = SimpleNamespace(create=self._create)
        self.api = SimpleNamespace(
            attach_socket=lambda *asked: self._ours, start=self._start, kill=self._call("kill"),
            remove_container=self._call("remove"),
        )  # fmt: skip

    def _create(self, **asked: Any) -> Any:
        self.labels = asked["labels"]
        self._ours, self._theirs = socket.socketpair()
        return SimpleNamespace(id="1")

    def _start(self, id: str) -> None:
        if self.said:
            data = self.said.encode()
            self._theirs.sendall(bytes([1, 0, 0, 0]) + len(data).to_bytes(4, "big") + data)

    def _call(self, name: str) -> Any:
        return lambda *asked, **options: self.calls.append(name)
