"""Digests of files: taken while they are written, and compared with what an index or a state records of them. No torch in here.

BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs): as strong as SHA-256 and three times as fast on one core, so that
hashing costs little more than reading. It releases Python's lock: in a thread of its own a digest costs a core, not time.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

from blake3 import blake3

from megatron_core_impl.shown import shown

INDEX_FILE = "index.json"  # of a folder of ours: what it holds, and the digests of its files (`checkpoint.index`)
QUEUED = 4  # blocks that may wait for the thread that follows: they stay in memory until then
READ_BYTES = 1 << 20  # less than a core caches: what was read is hashed where it is


class FileDigest(NamedTuple):
    """What is recorded of a file."""

    size: int
    blake3: str  # 64 hex digits, as b3sum prints them


class DamagedFile(ValueError):
    """A file that is not what was recorded of it. The message names it."""


class Follower:
    """A thread that does small jobs on what was written, in their order, while its caller goes on. A context manager."""

    def __init__(self) -> None:
        self._jobs: Queue[Callable[[], object] | None] = Queue(QUEUED)
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], object]) -> None:
        """Have a job done. Waits while several are waiting already."""
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when all jobs are done."""
        self._jobs.join()

    def check(self) -> None:
        """Raise what the first job raised that failed, if one did."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread, once all jobs are done."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # whatever it is: without this thread its caller would wait for ever
                self._failure = self._failure or error
            finally:
                self._jobs.task_done()


def file_blake3(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """BLAKE3 of a file's bytes, as hex. `progress` is told the bytes of each block that is done."""
    return _file_hash(path, blake3(), progress)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex: what others know it by, the Hub above all."""
    return _file_hash(path, hashlib.sha256(), lambda count: None)


def _file_hash(path: Path, running: Any, progress: Callable[[int], None]) -> str:
    block = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            running.update(block[:count])
            progress(count)
    digest: str = running.hexdigest()
    return digest


def file_digest(path: Path) -> FileDigest:
    """What is to be recorded of a file as it is now."""
    return FileDigest(path.stat().st_size, file_blake3(path))


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
    if file_blake3(folder / name, progress) != recorded.blake3:
        raise DamagedFile(f"{folder / name}: is not what was written: its digest differs from the one in {record}")


def parse_digests(files: Any) -> dict[str, FileDigest]:
    """Digests from JSON: {name: {"size", "blake3"}}.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(files, dict):
        raise ValueError("files must be an object of sizes and digests by file name")
    found = {}
    for name, entry in files.items():
        if name != Path(name).name or not name:
            raise ValueError(f"files: {name!r} must be the name of a file in the same folder")
        size, digest = (entry.get("size"), entry.get("blake3")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _is_digest(digest):
            raise ValueError(f"files: {name}: must have a size and a blake3 of 64 hex digits, this is {shown(entry)}")
        found[name] = FileDigest(size, digest)
    return found


def format_digests(files: Mapping[str, FileDigest]) -> dict[str, dict[str, Any]]:
    """Digests as JSON values: {name: {"size", "blake3"}}."""
    return {name: digest._asdict() for name, digest in sorted(files.items())}


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)
