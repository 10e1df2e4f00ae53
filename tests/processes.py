"""Waiting for processes, whether they live, and putting them to sleep."""

import os
import signal
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until something is so; fails when it takes too long."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not true():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(pause)  # for conditions that nothing tells of
        pause = min(1.2 * pause, 0.25)  # to look costs the cores: a request to a server, a look at all processes


def lives(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def asleep(pids: Collection[int], seconds: float) -> None:
    """Have processes stand still for so long, as all do while a laptop sleeps."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)  # what is tested is that time passes
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """Of a process, those that it started itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found
