"""Turns: what runs wait for, one after the other. Locks of the kernel, which drops them when their holder dies, however.

By default one stage at a time computes: its GPUs are all there are. Those that name their GPUs wait only for each other's.
Locks of GPUs are for all workspaces and people of the machine that runs start on, also those of other machines' GPUs; without
GPUs it is the trainings of a workspace that take turns.
Whoever holds one says so in its file, for those who wait.
"""

import contextlib
import fcntl
import os
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.records.flock import is_locked, locked
from stages.contracts.launch_settings import GPU_STAGES, Gpus

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


def locks_of(stage: str, workspace: Path, gpus: Gpus, engines: Sequence[str] = ()) -> list[Lock]:
    """What a stage has to hold that may compute on these GPUs of its machines, or on none.

    Args:
        engines: addresses of those that it runs on, as of `launch.hosts`. None: it is a process of this machine.
    """
    if stage not in GPU_STAGES or (gpus.known == 0 and stage != "train"):
        return []
    if gpus.known == 0:
        return [Lock(workspace / ".training", "its turn")]
    machines = sorted({_machine(engine) for engine in engines} or {""})  # everybody in this order: nobody waits in a circle
    return [lock for machine in machines for lock in _locks_of_gpus(gpus, machine)]


def _locks_of_gpus(gpus: Gpus, machine: str) -> list[Lock]:
    at, of = (f"@{machine}", f" of {machine}") if machine else ("", "")
    file, what = MACHINE / f"gpus{at}", f"the GPUs{of or ' of this machine'}"
    if not gpus.ids or not all(number.isdigit() for number in gpus.ids):  # any of them; or ids that can mean the same GPU
        return [Lock(file, what)]
    numbers = sorted({int(number) for number in gpus.ids})
    ones = [Lock(MACHINE / f"gpu-{number}{at}", f"GPU {number}{of}") for number in numbers]
    return [Lock(file, what, is_shared=True), *ones]


def _machine(engine: str) -> str:
    """The name of an engine's machine, as its address has it. Empty: this one."""
    name = urllib.parse.urlsplit(engine).hostname
    return "" if name is None or name in ("localhost", "127.0.0.1", socket.gethostname().lower()) else name


@contextlib.contextmanager
def in_turn(
    result: Path,
    locks: Sequence[Lock],
    who: str,
    *,
    stop: threading.Event,
    on_wait: Callable[[str], None],
    maker: Callable[[], str],
    prepare: Callable[[], object],
) -> Iterator[tuple[int, ...]]:
    """Hold locks as soon as nobody makes a result; who waits for that holds none of them meanwhile.

    Args:
        result: the lock of who makes it.
        maker: who that is.
        prepare: called when nobody makes it, nor can begin to.

    Raises:
        Stopped: `stop` was set.
    """
    while True:
        wait_until_free(result, stop=stop, on_wait=lambda: on_wait(f"waiting: {maker()} is making this result"))
        with held(locks, who, stop=stop, on_wait=on_wait) as descriptors:
            try:
                with locked(result, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    prepare()
            except BlockingIOError:  # another began it while we waited for the locks
                continue
            yield descriptors
            return


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
            os.ftruncate(descriptor, 0)  # of the last holder
            if not lock.is_shared:
                os.pwrite(descriptor, who.encode(), 0)
            descriptors.append(descriptor)
        yield tuple(descriptors)


def wait_until_free(file: Path, *, stop: threading.Event, on_wait: Callable[[], None]) -> None:
    """Wait while somebody holds a lock exclusively.

    Raises:
        Stopped: `stop` was set.
    """
    if is_locked(file):
        on_wait()
    while is_locked(file):
        if stop.wait(SECONDS):
            raise Stopped


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
    """A lock's file, made where it is not there. The machine's are everybody's, whoever made them: no link leads elsewhere."""
    is_shared = file.parent == MACHINE
    file.parent.mkdir(mode=0o1777, parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if is_shared else 0))
    try:
        if is_shared:
            with contextlib.suppress(PermissionError):
                os.fchmod(folder, 0o1777)
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(file.name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
            with contextlib.suppress(FileExistsError):  # in such a folder, the kernel refuses O_CREAT for a file of others
                descriptor = os.open(file.name, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
                os.fchmod(descriptor, 0o666 if is_shared else 0o644)
                return descriptor
    finally:
        os.close(folder)
