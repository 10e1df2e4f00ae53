"""What every launcher does with a stage's output, and what it makes of a stage's end.

Lines are stripped of secrets, then go to the log file and to whoever listens; events among them tell progress, and the stage's
own words on why it failed. An exit code, with those words or the last lines, becomes the error that a person reads.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flows.launch.output import Redactor, is_number, parse_event
from flows.launch.protocol import Caller, Progress, Reason, StageFailed, StageJob
from stages.contracts.process import ExitCode

LAST_LINES = 3  # of a stage that did not say why it ended
LONGEST_LAST = 160  # characters of each


class Listener:
    """Takes the lines of a stage, or of one of the machines that share it, whose `prefix` its lines then get."""

    def __init__(self, log: IO[str], redact: Redactor, caller: Caller, prefix: str = "") -> None:
        self.log = log
        self.redact = redact
        self.caller = caller
        self.prefix = prefix
        self.told: str | None = None  # the stage's own words on why it failed
        self.tail: deque[str] = deque(maxlen=20)

    def take(self, line: str) -> dict[str, Any] | None:
        """Pass on a line. Returns the event that it is, None where it is text."""
        line = self.redact(line)
        event = parse_event(line)
        if event is None:
            self.tail.append(line)
            self.log.write(f"{self.prefix}{line}\n")
            self.caller.on_line(f"{self.prefix}{line}")
        elif event["event"] == "error":
            self.told = str(event.get("message", "")) or None
        elif event["event"] == "progress" and is_number(event.get("done")) and is_number(event.get("total")):
            self.caller.on_progress(Progress(event["done"], event["total"], str(event.get("text", ""))))
        return event


@contextlib.contextmanager
def open_log(file: Path) -> Iterator[IO[str]]:
    """The log file of a stage, to go on in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", buffering=1) as log:
        yield log


def not_started(job: StageJob) -> StageFailed:
    """What to raise where a run was stopped before a stage began."""
    return StageFailed(job.node, "interrupted", "not started", log_file=job.log_file, code=ExitCode.INTERRUPTED)


def failure(job: StageJob, code: int, heard: Listener, *, stopped: bool) -> StageFailed:
    """The error of a stage that ended with this exit code."""
    reason, message = explain(code, heard.told, list(heard.tail), stopped=stopped)
    return StageFailed(job.node, reason, message, log_file=job.log_file, code=code)


def explain(code: int, told: str | None, tail: list[str], *, stopped: bool) -> tuple[Reason, str]:
    """What an exit code means, and the line that says so. `told` is the stage's own message, `tail` its last lines."""
    killed_by = -code if code < 0 else code - 128 if code > 128 else None
    if stopped:
        return "interrupted", told or "stopped"
    if killed_by is not None:
        try:
            name = signal.Signals(killed_by).name
        except ValueError:
            name = f"signal {killed_by}"
        if killed_by == signal.SIGKILL:
            by = "by somebody, or by the kernel, where the machine is out of memory"
            return "killed", f"killed ({name}) from outside: {by}. {last_lines(tail)}"
        return "killed", told or f"killed by {name}. {last_lines(tail)}"
    reasons: dict[int, Reason] = {
        ExitCode.BAD_INPUT: "bad input",
        ExitCode.GATE_FAILED: "gate failed",
        ExitCode.INTERRUPTED: "interrupted",
    }
    return reasons.get(code, "crash"), told or f"ended with exit code {code} and no message of its own. {last_lines(tail)}"


def last_lines(tail: list[str]) -> str:
    """The end of an output, in one line."""
    said = [line.strip() for line in tail if line.strip()][-LAST_LINES:]
    short = [line if len(line) <= LONGEST_LAST else f"{line[: LONGEST_LAST - 1]}…" for line in said]
    return f"Its last lines: {' ⏎ '.join(short)}" if short else "It printed nothing"
