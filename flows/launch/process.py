"""A stage as a plain process of this machine: `python -m stages.<stage> SPEC.json`, behind a shim that ends it with us."""

import contextlib
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flows.launch.environment import stage_environment
from flows.launch.listener import Listener, failure, not_started, open_log
from flows.launch.output import LineSplitter, Redactor
from flows.launch.protocol import Caller, StageJob

SHIM = Path(__file__).with_name("shim.py")
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL
TRAIN_GRACE_SECONDS = 600.0  # training finishes its step and writes a checkpoint in it


def grace_of(stage: str) -> float:
    """Seconds that a stage has to end by itself when it is asked to."""
    return TRAIN_GRACE_SECONDS if stage == "train" else GRACE_SECONDS


def shim_command(command: list[str], *, grace: float, options: list[str] | None = None) -> list[str]:
    """A command line that runs `command` behind the shim."""
    return [sys.executable, "-I", "-S", str(SHIM), "--grace", str(grace), *(options or []), "--", *command]


class ProcessLauncher:
    """Runs stages as processes of this machine."""

    def __init__(self, *, grace: float | None = None, visible_gpus: str | None = None) -> None:
        self.grace = grace  # None: what suits the stage
        self.visible_gpus = visible_gpus  # as CUDA_VISIBLE_DEVICES says it. None: all

    def command(self, job: StageJob) -> list[str]:
        """The stage's command line. `-P`: a folder `stages` in the person's current folder is not ours."""
        return [sys.executable, "-P", "-m", f"stages.{job.stage}", str(job.spec_file)]

    def run(self, job: StageJob, caller: Caller) -> None:
        """See `Launcher.run`."""
        if caller.stop.is_set():
            raise not_started(job)
        with open_log(job.log_file) as log, self._started(job, caller.stop) as (lines, ending):
            listener = Listener(log, Redactor.of(os.environ), caller)
            for line in lines:
                listener.take(line)
        if ending.code != 0:
            raise failure(job, ending.code, listener, stopped=ending.stopped)

    @contextlib.contextmanager
    def _started(self, job: StageJob, stop: threading.Event) -> Iterator[tuple[Iterator[str], "_Ending"]]:
        """The stage's lines as they come, and how it ended, filled in at the end. Nothing is left running after this."""
        ending, grace = _Ending(), self.grace if self.grace is not None else grace_of(job.stage)
        visible = {} if self.visible_gpus is None else {"CUDA_VISIBLE_DEVICES": self.visible_gpus}
        process = subprocess.Popen(
            shim_command(self.command(job), grace=grace),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=stage_environment(os.environ, talks_to_hub=job.talks_to_hub) | visible,
            start_new_session=True,  # Ctrl-C reaches us, and we stop the stage
            pass_fds=job.holds,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield self._lines(process.stdin, process.stdout, stop, ending, grace), ending
        finally:
            # Reached early when a handler of ours failed or the thread was interrupted: the stage must end then, too.
            with contextlib.suppress(OSError):
                process.stdin.close()
            _drain(process.stdout, grace + 10)  # a stage that cannot write could not end gracefully
            process.stdout.close()
            try:
                ending.code = process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                ending.code = process.wait()

    def _lines(
        self, stdin: IO[bytes], stdout: IO[bytes], stop: threading.Event, ending: "_Ending", grace: float
    ) -> Iterator[str]:
        splitter = LineSplitter()
        give_up = float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while time.monotonic() < give_up:
                if stop.is_set() and not ending.stopped:
                    ending.stopped = True
                    give_up = time.monotonic() + grace + 10
                    stdin.close()  # the shim's sign to stop the stage
                if selector.select(timeout=0.2):
                    data = os.read(stdout.fileno(), 1 << 16)
                    if not data:
                        break
                    yield from splitter.feed(data)
        if rest := splitter.end():
            yield rest


def _drain(stdout: IO[bytes], seconds: float) -> None:
    """Read to the end and forget it."""
    give_up = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while time.monotonic() < give_up:
            if selector.select(timeout=0.2) and not os.read(stdout.fileno(), 1 << 16):
                return


class _Ending:
    """How a stage ended."""

    code: int = 0
    stopped: bool = False  # by us
