"""Stand-ins for Docker engines: one that only says what it is, and the client of one whose containers are sockets."""

import json
import socket
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from answering import answering


def engine_of(path: Path, *, api: str = "1.41") -> AbstractContextManager[str]:
    """An engine with this version of its API at a socket."""
    body = json.dumps({"ApiVersion": api, "Version": "1"}).encode()
    return answering(lambda asked: (200, body), path)


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
