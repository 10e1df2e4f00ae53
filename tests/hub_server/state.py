"""What a server knows, and what it remembers of its clients."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_server.content import Blob, Content, Repo


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    status: int

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class Refusal(Exception):
    """An answer that is an error: status, the Hub's error code, its message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Drop(Exception):
    """No answer: the connection breaks."""


class Hub:
    """Repos, users, uploads, and the faults that a test asks for."""

    url: str
    storage_url: str  # another host name: tokens must not be sent there

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.users: dict[str, str] = {}  # token -> user
        self.readers: set[str] = set()  # tokens that may only read
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}  # sha256 -> content, of LFS uploads that are complete
        self.parts: dict[tuple[str, int], bytes] = {}  # sha256, number -> content, of those that are not
        self.part_size: int | None = None  # uploads that are larger come in parts of this size
        self.received: Counter[str] = Counter()  # sha256 -> bytes of it that arrived, repeated ones as often as they did
        self.cuts: dict[str, list[tuple[int, bool]]] = {}  # file name -> bytes after which to cut, and whether with a reset
        self.slow: set[str] = set()  # names of files that arrive over a slow line
        self.corrupt: set[str] = set()  # names of files that arrive, on either side, with a bit changed
        self.xet = False  # whether new large files go through Xet
        self.xet_hashes: dict[str, str] = {}  # sha256 -> Xet's hash, which the real storage knows by itself
        # Called before an answer (method, path) and at each piece of an upload (sha256, bytes so far): either may raise
        # Refusal or Drop.
        self.on_request: Callable[[str, str], None] = lambda method, path: None
        self.on_receive: Callable[[str, int], None] = lambda sha256, received: None
        self.loses: Callable[[str, str], bool] = lambda method, path: False  # whether an answer gets lost on its way
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def add(self, repo_id: str, files: Mapping[str, Content | str], *, kind: str = "models", **settings: Any) -> Repo:
        """Make a repo with one commit on main."""
        repo = Repo(kind, repo_id, **settings)
        repo.commit({n: Blob.of(n, c.encode() if isinstance(c, str) else c) for n, c in files.items()})
        self.repos[kind, repo_id] = repo
        return repo

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]
