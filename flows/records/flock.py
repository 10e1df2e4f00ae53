"""Locks on files, of the kernel: it drops them when their holder dies, however, and all that inherited them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(file: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a lock on a file, which is made where it is not there. Yields the descriptor, which others can inherit.

    Raises:
        BlockingIOError: another has it, and `how` says LOCK_NB, not to wait.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(file: Path) -> bool:
    """Whether somebody holds a lock exclusively."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not take each other for a holder
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
