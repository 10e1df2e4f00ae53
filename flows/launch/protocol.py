"""What a launcher is given, what it does, and how it tells that a stage failed.

A launcher starts one stage with a spec, streams its output, and owns what it started: whatever ends the launcher also ends
the stage and all its children. There are two: plain processes (`process.py`) and containers (`docker.py`).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Reason = Literal["crash", "bad input", "gate failed", "interrupted", "killed", "out of memory"]


@dataclass(frozen=True)
class StageJob:
    """One stage to run."""

    node: str  # name in the pipeline
    stage: str  # the module: stages.<stage>
    spec_file: Path
    log_file: Path  # receives the whole output, redacted
    run: str  # name of the run that it belongs to
    talks_to_hub: bool = False  # only then it gets the Hub's token, and in a container a way out to the network
    holds: tuple[int, ...] = ()  # descriptors of locks, which what ends the stage with us holds until the stage has ended


@dataclass(frozen=True)
class Progress:
    """How far a stage is, in units of its own, and a line for people."""

    done: float
    total: float
    text: str

    @property
    def share(self) -> float:
        """Part that is done, from 0 to 1."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else 0.0


@dataclass(frozen=True)
class Caller:
    """Who has a stage run: hears what it does, and may stop it."""

    on_line: Callable[[str], object]  # gets every line of output, redacted
    on_progress: Callable[[Progress], object]
    stop: threading.Event  # once set, the stage is asked to end and, after a grace period, killed


class StageFailed(Exception):
    """A stage that did not end well. `str()` is the line that a person reads."""

    def __init__(self, node: str, reason: Reason, message: str, *, log_file: Path, code: int) -> None:
        super().__init__(node, reason, message)
        self.node = node
        self.reason: Reason = reason
        self.message = message
        self.log_file = log_file
        self.code = code

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


class Launcher(Protocol):
    """One way of running a stage."""

    def run(self, job: StageJob, caller: Caller) -> None:
        """Run a stage to its end, in the calling thread. Where that is interrupted, the stage is stopped, too.

        Raises:
            StageFailed: it ended with anything but success, or was stopped.
        """
        ...
