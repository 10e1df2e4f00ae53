"""SHA-256 of files: taken while they are written, and compared with what an index or a state records of them. No torch in here.

Hashing releases Python's lock, so a digest that is taken in a thread of its own costs a core, not time.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

INDEX_FILE = "index.json"  # of a folder of ours: what it holds, and the digests of its files (`checkpoint.index`)
QUEUED = 4  # blocks that may wait to be hashed: they stay in memory until then
READ_BYTES = 4 << 20


class FileDigest(NamedTuple):
    """What is recorded of a file."""

    size: int
    sha256: str


class DamagedFile(ValueError):
    """A file that is not what was recorded of it. The message names it."""


class RunningDigest:
    """The SHA-256 of bytes that arrive piece by piece, in a thread of its own."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pieces: Queue[bytes | memoryview | None] = Queue(QUEUED)
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, piece: bytes | memoryview) -> None:
        """Take further bytes, which must not change before `finish`. Waits while several pieces are waiting already."""
        self._pieces.put(piece)

    def finish(self) -> str:
        """The digest of all pieces, as hex. Ends the thread; call it also when the digest is of no use any more."""
        self._pieces.put(None)
        self._thread.join()
        return self._sha256.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._sha256.update(piece)


def file_sha256(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file's bytes, as hex. `progress` is told the bytes of each block that is done."""
    digest, block = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.hexdigest()


def file_digest(path: Path) -> FileDigest:
    """What is to be recorded of a file as it is now."""
    return FileDigest(path.stat().st_size, file_sha256(path))


def check_size(folder: Path, name: str, recorded: FileDigest, record: str) -> None:
    """Refuse a file that is not there, or has another size than `record` says, the file that its digest was read from.

    Raises:
        DamagedFile: naming the file.
    """
    path = folder / name
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFile(f"{path}: missing, and {record} needs it") from None
    if size != recorded.size:
        fault = "is truncated" if size < recorded.size else "is not what was written"
        raise DamagedFile(f"{path}: {fault}: has {size:,} bytes, {record} says {recorded.size:,}")


def check_file(
    folder: Path, name: str, recorded: FileDigest, record: str, progress: Callable[[int], None] = lambda count: None
) -> None:  # fmt: skip
    """Refuse a file whose bytes are not those that `record` tells of: size first, then the digest.

    Raises:
        DamagedFile: naming the file.
    """
    check_size(folder, name, recorded, record)
    if file_sha256(folder / name, progress) != recorded.sha256:
        raise DamagedFile(f"{folder / name}: is not what was written: its SHA-256 differs from the one in {record}")


def parse_digests(files: Any) -> dict[str, FileDigest]:
    """Digests from JSON: {name: {"size", "sha256"}}.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(files, dict):
        raise ValueError("files must be an object of sizes and digests by file name")
    found = {}
    for name, entry in files.items():
        if name != Path(name).name or not name:
            raise ValueError(f"files: {name!r} must be the name of a file in the same folder")
        size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _is_sha256(sha256):
            raise ValueError(f"files: {name}: must have a size and a sha256 of 64 hex digits, this is {str(entry)[:100]}")
        found[name] = FileDigest(size, sha256)
    return found


def format_digests(files: Mapping[str, FileDigest]) -> dict[str, dict[str, Any]]:
    """Digests as JSON values: {name: {"size", "sha256"}}."""
    return {name: digest._asdict() for name, digest in sorted(files.items())}


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)
