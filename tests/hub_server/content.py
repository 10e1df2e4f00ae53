"""What repos hold: blobs, commits, branches, tags."""

import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LARGE = 512 << 10  # files from this size on are LFS files, whatever their name
LARGE_NAMES = re.compile(r"\.(safetensors|bin|parquet|model|png)$")
CHUNK = 1 << 20

Content = bytes | Path  # a file's content; a path is read piece by piece


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: Content
    size: int
    sha256: str
    oid: str  # git's own hash of the file, or of its LFS pointer
    large: bool
    xet_hash: str | None = None

    @classmethod
    def of(cls, name: str, content: Content) -> "Blob":
        sha256, sha1 = hashlib.sha256(), hashlib.sha1()
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha1.update(f"blob {size}\0".encode())
        for piece in pieces(content):
            sha256.update(piece)
            sha1.update(piece)
        large = size >= LARGE or LARGE_NAMES.search(name) is not None
        return cls(content, size, sha256.hexdigest(), sha1.hexdigest(), large)


def pieces(content: Content, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Bytes start … end of a file's content, piece by piece."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        file.seek(start)
        left = sys.maxsize if end is None else end - start
        while left and (piece := file.read(min(CHUNK, left))):
            left -= len(piece)
            yield piece


def damaged(content: bytes) -> bytes:
    """As long, but different in one bit."""
    return content[:-1] + bytes([content[-1] ^ 1])


@dataclass
class Repo:
    """A repo: branches and tags point to commits, a commit is its files."""

    kind: str  # "models" or "datasets"
    id: str
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)  # users who accepted the licence
    branches: dict[str, str] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)  # branches that nobody may write to
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], message: str = "", branch: str = "main") -> str:
        listing = sorted((name, blob.sha256) for name, blob in files.items())
        sha = hashlib.sha1(json.dumps([self.kind, self.id, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    def files(self, branch: str) -> dict[str, Blob]:
        """Those of a branch; none where there is no such branch yet."""
        return self.commits[self.branches[branch]] if branch in self.branches else {}

    @property
    def head(self) -> dict[str, Blob]:
        return self.files("main")
