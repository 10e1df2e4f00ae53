"""A stage as a plain process of this machine: `python -m stages.<stage> SPEC.json`, behind a shim that ends it with us."""

import contextlib
import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from flows.launch.output import LineSplitter, Redactor, is_number, parse_event
from flows.launch.protocol import Progress, Reason, StageFailed, StageJob
from stages.contracts.process import ExitCode

SHIM = Path(__file__).with_name("shim.py")
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL
TRAIN_GRACE_SECONDS = 600.0  # training finishes its step and writes a checkpoint in it

# What a stage gets from our environment: where programs, caches and devices are. No secrets, nothing of Prefect.
ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
)  # fmt: skip
ALLOWED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "TRITON_", "OMP_", "MKL_")
# Only the stages that talk to the Hub: its token and address, and how to get out of this network (proxies have passwords).
ONLY_FOR_HUB = (
    "HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT",
)  # fmt: skip
HUB_STAGES = frozenset({"download", "push"})


def stage_environment(stage: str, ours: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage: what is allowed of ours, and what tells it that a launcher listens."""
    names = set(ALLOWED) | (set(ONLY_FOR_HUB) if stage in HUB_STAGES else set())
    environment = {k: v for k, v in ours.items() if k in names or k.startswith(ALLOWED_PREFIXES)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_source_root(), environment.get("PYTHONPATH")]))
    return environment | {"STAGE_EVENTS": "1", "PYTHONUNBUFFERED": "1"}


def _source_root() -> str:
    """The folder that holds the package `stages`, wherever the person's current folder is."""
    spec = importlib.util.find_spec("stages")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])


def shim_command(command: list[str], *, grace: float, options: list[str] | None = None) -> list[str]:
    """A command line that runs `command` behind the shim."""
    return [sys.executable, "-I", "-S", str(SHIM), "--grace", str(grace), *(options or []), "--", *command]


class ProcessLauncher:
    """Runs stages as processes of this machine."""

    def __init__(self, *, grace: float | None = None) -> None:
        self.grace = grace  # None: what suits the stage

    def grace_of(self, job: StageJob) -> float:
        """Seconds that a stage has to end by itself when it is asked to."""
        if self.grace is not None:
            return self.grace
        return TRAIN_GRACE_SECONDS if job.stage == "train" else GRACE_SECONDS

    def command(self, job: StageJob) -> list[str]:
        """The stage's command line. `-P`: a folder `stages` in the person's current folder is not ours."""
        return [sys.executable, "-P", "-m", f"stages.{job.stage}", str(job.spec_file)]

    def run(
        self,
        job: StageJob,
        *,
        on_line: Callable[[str], None],
        on_progress: Callable[[Progress], None],
        stop: threading.Event,
    ) -> None:
        """See `Launcher.run`."""
        if stop.is_set():
            raise StageFailed(job.node, "interrupted", "not started", log_file=job.log_file, code=ExitCode.INTERRUPTED)
        redact = Redactor.of(os.environ)
        told: str | None = None  # the stage's own words on why it failed
        tail: deque[str] = deque(maxlen=20)
        job.log_file.parent.mkdir(parents=True, exist_ok=True)
        with job.log_file.open("a", encoding="utf-8", buffering=1) as log, self._started(job, stop) as (lines, ending):
            for line in map(redact, lines):
                event = parse_event(line)
                if event is None:
                    log.write(line + "\n")
                    tail.append(line)
                    on_line(line)
                elif event["event"] == "error":
                    told = str(event.get("message", "")) or None
                elif event["event"] == "progress" and is_number(event.get("done")) and is_number(event.get("total")):
                    on_progress(Progress(event["done"], event["total"], str(event.get("text", ""))))
        if ending.code == 0:
            return
        reason, message = explain(ending.code, told, list(tail), stopped=ending.stopped)
        raise StageFailed(job.node, reason, message, log_file=job.log_file, code=ending.code)

    @contextlib.contextmanager
    def _started(self, job: StageJob, stop: threading.Event) -> Iterator[tuple[Iterator[str], "_Ending"]]:
        """The stage's lines as they come, and how it ended, filled in at the end. Nothing is left running after this."""
        ending, grace = _Ending(), self.grace_of(job)
        process = subprocess.Popen(
            shim_command(self.command(job), grace=grace),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=stage_environment(job.stage, os.environ),
            start_new_session=True,  # Ctrl-C reaches us, and we stop the stage
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
            return "killed", f"killed ({name}) from outside: probably by the kernel, out of memory"
        return "killed", told or f"killed by {name}"
    reasons: dict[int, Reason] = {
        ExitCode.BAD_INPUT: "bad input",
        ExitCode.GATE_FAILED: "gate failed",
        ExitCode.INTERRUPTED: "interrupted",
    }
    last = next((line.strip() for line in reversed(tail) if line.strip()), "no output")
    return reasons.get(code, "crash"), told or f"ended with exit code {code} and no message of its own. Last line: {last}"
