"""Arrays that take long to make, kept on disk under a name that says what they were made from.

An entry is a folder `<hash of its key>/` with `key.json` and one `.npy` per array, which whoever opens it maps into memory. It
appears by one rename, so it is there whole or not at all. Of several processes that need it at once one makes it, under a lock
that dies with its holder; the others wait and map. Sizes and checksums are compared whenever an entry is opened, and a damaged
one is made again. Nothing else depends on the folder: it can be deleted at any time.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1  # raise it when the same key would give other arrays
KEY_FILE = "key.json"

Arrays = dict[str, npt.NDArray[Any]]


class _Damaged(Exception):
    """An entry is not what was written."""


def cached(folder: Path | None, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a key: those of the cache, or new ones, which are put there.

    Args:
        folder: the cache; it is made where it is missing. None: nothing is kept.
        key: everything that decides the arrays, as JSON values.
        make: makes them.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder is None:
        return make()
    name = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:24]
    entry = folder / name
    try:
        return _open(entry)
    except _Damaged:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{name}.lock"):
        try:
            return _open(entry)  # another process has made it meanwhile
        except _Damaged:
            _write(entry, key, make())
        return _open(entry)


def _open(entry: Path) -> Arrays:
    """Map the arrays of an entry."""
    try:
        record = json.loads((entry / KEY_FILE).read_bytes())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in record["arrays"]}
        sums = {name: zlib.crc32(np.asarray(array).data) for name, array in arrays.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise _Damaged from error
    if sums != record["arrays"]:
        raise _Damaged
    # As plain arrays: indexing a memmap makes another memmap each time, which costs more than the read.
    return {name: np.asarray(array) for name, array in arrays.items()}


def _write(entry: Path, key: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an entry in place of what is there. The caller holds its lock."""
    unfinished = entry.parent / f".{entry.name}.tmp"
    for leftover in (unfinished, entry):  # processes that have mapped the old files keep them
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    for name, array in arrays.items():
        np.save(unfinished / f"{name}.npy", array)
    sums = {name: zlib.crc32(np.ascontiguousarray(array).data) for name, array in arrays.items()}
    (unfinished / KEY_FILE).write_text(json.dumps({**key, "arrays": sums}, indent=1) + "\n")
    unfinished.rename(entry)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
