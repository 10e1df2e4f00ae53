"""Files and folders that survive a crash of the machine: fsync before the rename that makes them count."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <fcntl.h>


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)  # the kernel knows a number only; a person wants the file
        raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything below it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def begin_write_back(path: Path, offset: int, count: int) -> None:
    """Let the kernel begin to write a part of a file to the disk, so that the fsync at the end has little left to wait for.

    A hint: it reports nothing, and does nothing where the system has no such call.
    """
    call = _sync_file_range()
    if call is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        call(descriptor, offset, count, _WRITE)
    finally:
        os.close(descriptor)


@cache
def _sync_file_range() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
