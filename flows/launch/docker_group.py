"""The containers that share a stage, mostly one: all of their output in one place, and one end for all of them."""

import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from flows.launch.docker_container import END_SECONDS, Container, Ending
from flows.launch.listener import Listener
from stages.contracts.process import ExitCode

MOST_WAITING = 1000  # lines that are read and not yet passed on: beyond them the containers wait
COMPANY_SECONDS = 30.0  # that the others have to end in, when one has failed, or the first is done


@dataclass
class Member:
    """A container of the group."""

    container: Container
    listener: Listener
    host: str
    ending: Ending | None = None
    ended_at: float = 0.0
    is_asked: bool = False  # to stop, by us, before it ended
    is_killed: bool = False  # by us


class Group:
    """Containers that run at the same time. Leaving the group ends and removes all of them, gracefully first."""

    def __init__(self, grace: float) -> None:
        self.members: list[Member] = []
        self.is_stopped = False  # by us, because the run was stopped
        self._grace = grace
        self._lines: queue.Queue[tuple[Member, str | Ending]] = queue.Queue(MOST_WAITING)
        self._give_up = float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if any(member.ending is None for member in self.members):  # a handler failed, or the thread was interrupted
                self._end_all(self._grace)
                self._pass_on(lambda member, line: None)
        finally:
            for member in self.members:
                member.container.remove()

    def add(self, container: Container, listener: Listener, host: str) -> None:
        """Take a container that runs."""
        member = Member(container, listener, host)
        self.members.append(member)
        threading.Thread(target=self._read, args=[member], daemon=True, name=container.name).start()

    def _read(self, member: Member) -> None:
        for line in member.container.lines():
            self._lines.put((member, line))
        self._lines.put((member, member.container.ended(self._grace)))

    def listen(self, stop: threading.Event, on_event: Callable[[Member, dict[str, Any]], None]) -> None:
        """Pass on the output until every container has ended. `on_event` gets the events in it."""

        def take(member: Member, line: str) -> None:
            if (event := member.listener.take(line)) is not None:
                on_event(member, event)

        self._pass_on(take, stop)

    def _pass_on(self, take: Callable[[Member, str], None], stop: threading.Event | None = None) -> None:
        while any(member.ending is None for member in self.members):
            if stop is not None and stop.is_set() and not self.is_stopped:
                self.is_stopped = True
                self._end_all(self._grace)
            if time.monotonic() > self._give_up:
                self._kill_all()
            try:
                member, line = self._lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(line, str):
                take(member, line)
                continue
            member.ending, member.ended_at = line, time.monotonic()
            if member.ending.code != ExitCode.OK or member is self.members[0]:
                self._end_all(COMPANY_SECONDS, ask=member.ending.code != ExitCode.OK)

    def _end_all(self, seconds: float, *, ask: bool = True) -> None:
        """Give those that still run so long to end, by themselves or asked to."""
        self._give_up = min(self._give_up, time.monotonic() + seconds + END_SECONDS)
        for member in self.members:
            if ask and member.ending is None and not member.is_asked:
                member.is_asked = True
                member.container.ask_to_stop()

    def _kill_all(self) -> None:
        self._give_up = float("inf")
        for member in self.members:
            if member.ending is None:
                member.is_killed = True
                member.container.kill()

    def failed(self) -> Member | None:
        """The member that failed, and not because another did; None when all is well.

        The first to end need not be it: its peers notice at once that it is gone, while it still cleans up.
        """
        first = self.members[0]
        if first.ending is not None and first.ending.code == ExitCode.OK:
            return None  # it has published the result
        bad = [member for member in self.members if member.ending is not None and member.ending.code != ExitCode.OK]
        return first if self.is_stopped else min(bad, key=_guilt)


def _guilt(member: Member) -> tuple[int, float]:
    """How well an end explains a failure, the lowest best; of equals, the first."""
    ending = member.ending
    assert ending is not None
    if ending.is_out_of_memory:
        return 0, member.ended_at
    if member.is_killed or (member.is_asked and ending.code in (ExitCode.INTERRUPTED, 128 + signal.SIGTERM)):
        return 4, member.ended_at
    if ending.code > 128 or ending.lost:
        return 1, member.ended_at
    return 2 if ending.code in (ExitCode.BAD_INPUT, ExitCode.GATE_FAILED) else 3, member.ended_at
