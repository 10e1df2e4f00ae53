"""Stands between a launcher and what it starts, so that nothing outlives the launcher. Run as a script, with the standard
library only:

    python shim.py --grace SECONDS [--while-used FILE [--keep FILE]] [--in-container] -- COMMAND …

It ends the command when its owner is gone. The owner is by default whoever holds the other end of its standard input: the
kernel closes that pipe however the owner dies (kill -9 of its process group too: the shim has a session of its own). With
`--while-used`, the owners are all processes that hold a shared lock on FILE, and the command stays while FILE named by
`--keep` exists.

In a container it is the first program: the engine holds the other end of its standard input for a launcher that is attached,
and closes it when the launcher is gone, on another machine too. With `--in-container`, the first line of standard input is
JSON: an environment to add to the command's, which so is in no configuration of a container; and the two outputs are one, in
order.

Ending means: SIGTERM to the command, SIGKILL after the grace period, then SIGKILL to every descendant that is left, those in
other sessions too (torchrun's workers are): the shim is their subreaper, so all orphans become its children. Its exit code
is the command's, or 128 + the number of the signal that killed it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_shim() -> None:
    """In the new child: should the shim itself be killed, the command is told to stop."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _children() -> list[int]:
    """Our children, from /proc. Empty where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _end_descendants(group: int) -> None:
    """Kill all that is left. The children of a killed process become ours, so this goes on until there are none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class Owner:
    """Who the command works for: a pipe that closes, or the holders of a lock."""

    def __init__(self, while_used: Path | None, keep: Path | None) -> None:
        self.while_used = while_used
        self.keep = keep
        self.lock = os.open(while_used, os.O_RDWR | os.O_CREAT, 0o600) if while_used else None

    def is_gone(self, pipe_is_readable: bool) -> bool:
        if self.lock is None:
            return pipe_is_readable and os.read(0, 4096) == b""
        if self.keep is not None and self.keep.exists():
            return False
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept until we exit: who comes now waits for our end
        except BlockingIOError:
            return False
        return True


def read_environment() -> dict[str, str] | None:
    """The environment in the first line of standard input, of which no byte more is read. None: the owner was gone before."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return None
        line += byte
    return {str(name): str(value) for name, value in json.loads(line).items()}


def supervise(command: list[str], grace: float, owner: Owner, added: dict[str, str]) -> int:
    """Run the command until it ends or has to; returns the exit code."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # only to wake us

    started = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_shim, env=os.environ | added
    )
    deadline: float | None = None
    watched = [reader, 0] if owner.lock is None else [reader]
    while True:
        ready, _, _ = select.select(watched, [], [], _patience(deadline, owner))
        if reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
        status = _reap(started.pid)
        if status is not None:
            break
        if deadline is None and (asked or owner.is_gone(0 in ready)):
            deadline = time.monotonic() + grace
            watched = [reader]
            os.kill(started.pid, signal.SIGTERM)
        elif deadline is not None and time.monotonic() >= deadline:
            os.kill(started.pid, signal.SIGKILL)
            deadline = time.monotonic() + 1.0
    started.returncode = os.waitstatus_to_exitcode(status)
    _end_descendants(started.pid)
    return started.returncode if started.returncode >= 0 else 128 - started.returncode


def _patience(deadline: float | None, owner: Owner) -> float | None:
    """Seconds to sleep at most: to the end of the grace period, or, where a lock has to be looked at, half a second."""
    if deadline is not None:
        return max(0.0, deadline - time.monotonic())
    return None if owner.lock is None else 0.5


def _reap(pid: int) -> int | None:
    """Collect children that have ended; returns the command's status when it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, code = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                break
            if ended == pid:
                status = code
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--while-used", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--in-container", action="store_true")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    added: dict[str, str] = {}
    if arguments.in_container:
        os.dup2(1, 2)
        environment = read_environment()
        if environment is None:
            return 128 + signal.SIGTERM
        added = environment
    code = supervise(arguments.command, arguments.grace, Owner(arguments.while_used, arguments.keep), added)
    if arguments.keep is not None:
        arguments.keep.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
