"""Turns: what runs wait for, one after the other. Locks of the kernel, which drops them when their holder dies, however.

By default one training at a time: its GPUs are all there are. Trainings that name their GPUs wait only for each other's. Locks
of GPUs are the machine's, for all workspaces and people; without GPUs they are the workspace's. Whoever holds one says so in
its file, for those who wait.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.contracts.launch_settings import Gpus

MACHINE = Path("/tmp/megatron-flows")  # not $TMPDIR: everybody's trainings meet there
SECONDS = 0.3  # between two looks
LONGEST_NAME = 300  # characters of what a holder says


class Stopped(Exception):
    """The run was stopped while it waited."""


@dataclass(frozen=True)
class Lock:
    """A file, and what it stands for."""

    file: Path
    what: str
    is_shared: bool = False  # with others who share it, against one who does not


def training_locks(workspace: Path, gpus: Gpus) -> list[Lock]:
    """What a training has to hold that computes on these GPUs of this machine, or on none."""
    if gpus.known == 0:
        return [Lock(workspace / ".training", "its turn")]
    if not gpus.ids or not all(number.isdigit() for number in gpus.ids):  # any of them; or ids that can mean the same GPU
        return [Lock(MACHINE / "gpus", "the GPUs of this machine")]
    numbers = sorted({int(number) for number in gpus.ids})  # everybody in this order: nobody waits in a circle
    ones = [Lock(MACHINE / f"gpu-{number}", f"GPU {number}") for number in numbers]
    return [Lock(MACHINE / "gpus", "the GPUs of this machine", is_shared=True), *ones]


@contextlib.contextmanager
def held(
    locks: Sequence[Lock], who: str, *, stop: threading.Event, on_wait: Callable[[str], None]
) -> Iterator[tuple[int, ...]]:
    """Hold locks, waiting for each. `on_wait` is told what for, and who has it.

    Yields the descriptors: processes that inherit them hold the locks, too, until they end.

    Raises:
        Stopped: `stop` was set.
    """
    with contextlib.ExitStack() as stack:
        descriptors = []
        for lock in locks:
            descriptor = _open(lock.file)
            stack.callback(os.close, descriptor)
            how = fcntl.LOCK_SH if lock.is_shared else fcntl.LOCK_EX
            for told in _attempts(descriptor, how, stop):
                on_wait(f"waiting for {lock.what}{told}")
            if not lock.is_shared:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, who.encode(), 0)
            descriptors.append(descriptor)
        yield tuple(descriptors)


def wait_until_free(file: Path, *, stop: threading.Event, on_wait: Callable[[], None]) -> bool:
    """Wait while somebody holds a lock exclusively. Returns whether somebody did.

    Raises:
        Stopped: `stop` was set.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    waited = False
    try:
        for _ in _attempts(descriptor, fcntl.LOCK_SH, stop):
            if not waited:
                on_wait()
            waited = True
    finally:
        os.close(descriptor)
    return waited


def _attempts(descriptor: int, how: int, stop: threading.Event) -> Iterator[str]:
    """Try to get a lock until it is ours; yields after each attempt in vain, with who has it."""
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(descriptor, LONGEST_NAME, 0).decode(errors="replace")
            yield f": {holder} has it" if holder else ""
        if stop.wait(SECONDS):
            raise Stopped


def _open(file: Path) -> int:
    """A lock's file, made where it is not there. The machine's are everybody's, whoever made them."""
    is_shared = file.parent == MACHINE
    file.parent.mkdir(mode=0o1777, parents=True, exist_ok=True)
    if is_shared:
        with contextlib.suppress(PermissionError):
            file.parent.chmod(0o1777)
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        with contextlib.suppress(FileExistsError):  # in such a folder, the kernel refuses O_CREAT for a file of others
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL, 0o600)
            os.fchmod(descriptor, 0o666 if is_shared else 0o644)
            return descriptor
