"""A launch in this thread, and what was heard of it."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from flows.launch.protocol import Caller, Launcher, Progress, StageJob

if TYPE_CHECKING:  # they take a while to load, and tests that start a process of their own load one of them
    from flows.launch.docker import DockerLauncher
    from flows.launch.process import ProcessLauncher

L = TypeVar("L", bound="ProcessLauncher | DockerLauncher")


def doing(command: list[str], launcher: L) -> L:
    """The launcher, which runs this instead of a stage."""
    launcher.command = lambda job: command  # type: ignore[method-assign]
    return launcher


class Watched:
    """A job for a launcher. What is done with a line, `on_line`, can be replaced."""

    def __init__(self, launcher: Launcher, job: StageJob) -> None:
        self.launcher = launcher
        self.job = job
        self.lines: list[str] = []
        self.progress: list[Progress] = []
        self.stop = threading.Event()
        self.on_line: Callable[[str], object] = self.lines.append

    def run(self) -> None:
        self.launcher.run(self.job, Caller(self.on_line, self.progress.append, self.stop))
