"""Worker processes of a stage: started by torchrun, listened to, asked to stop, never left behind.

    the stage (no torch)  →  python -m stages.torchrun  →  workers: python -m MODULE ARGUMENTS, with RANK set

- Workers talk to the stage in lines `@@worker {json}` on stdout, each one write of at most PIPE_BUF bytes, which the kernel
  does not mix with those of other workers. What else they or torchrun print goes to a log file.
- The stage turns SIGTERM and SIGINT into a SIGTERM to every worker, which then stops in its own good time; torchrun just sees
  its workers end. A second signal ends all at once.
- Several machines share the workers of a stage, where STAGE_NODES says so: each runs its part of them under a torchrun of its
  own, which all meet where STAGE_RENDEZVOUS says, on the first of them. The worker of rank 0 is there, too.
- The stage holds the other end of everybody's stdin. When the stage dies, however it dies, they find its end and kill
  themselves; the kernel kills them too when their parent dies (PR_SET_PDEATHSIG).
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import megatron_core_impl
from stages.contracts.process import ExitCode
from stages.outcomes import BadInput, StageError

if TYPE_CHECKING:
    import torch

EVENT_PREFIX = "@@worker "
PR_SET_PDEATHSIG = 1  # linux/prctl.h
COMPANY_SECONDS = 5  # torchrun gives the other workers 30 s after a failure: what fails later was killed by torchrun

Event = dict[str, Any]


@dataclass(frozen=True)
class Nodes:
    """The machines that share the workers, and which of them this one is."""

    count: int = 1
    rank: int = 0
    rendezvous: str = ""  # address and port of the first one

    @classmethod
    def here(cls) -> "Nodes":
        """As whoever started the stage says."""
        return cls(
            int(os.environ.get("STAGE_NODES", 1)), int(os.environ.get("STAGE_NODE", 0)), os.environ.get("STAGE_RENDEZVOUS", "")
        )

    def options(self) -> list[str]:
        """Of torchrun."""
        if self.count == 1:
            return ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        address, _, port = self.rendezvous.rpartition(":")
        # static: the ranks are as the nodes are numbered, so that rank 0 is where its stage listens
        return [
            f"--nnodes={self.count}", f"--node-rank={self.rank}", "--rdzv-backend=static",
            f"--master-addr={address}", f"--master-port={port}",
        ]  # fmt: skip


class WorkerCrashed(StageError):
    """A worker ended by a defect of ours, or for no reason that it told."""

    code = ExitCode.CRASH


@dataclass
class Outcome:
    """What became of the workers."""

    returncode: int = 0  # torchrun's
    is_stopped: bool = False  # a signal asked them to stop
    killed: tuple[int, signal.Signals] | None = None  # the first worker that a signal ended: its rank, the signal
    errors: list[Event] = field(default_factory=list)  # what workers told of their ends, in order


def run_workers(
    module: str, arguments: list[str], *,
    processes: int, log: Path, on_event: Callable[[Event], None], nodes: Nodes = Nodes(),
) -> Outcome:  # fmt: skip
    """Run `python -m module arguments` in several processes under torchrun, until all have ended.

    Args:
        module, arguments: what each worker runs. It calls `join` first.
        processes: how many on this machine.
        log: file that gets what is printed and is no event.
        on_event: called for each event that a worker tells, which has at least `event` and `rank`. `hello` and `error` are
            kept here.
        nodes: the machines that share them.
    """
    process = subprocess.Popen(
        [
            sys.executable, "-m", "stages.torchrun", *nodes.options(), f"--nproc-per-node={processes}", "--max-restarts=0",
            "-m", module, *arguments,
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in a terminal is for the stage to pass on
        env=_environment(processes, is_alone=nodes.count == 1),
    )  # fmt: skip
    outcome = Outcome()
    pids: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if outcome.is_stopped or not pids:
            process.kill()  # and with it the workers: asked twice, or before there is anything to save
        outcome.is_stopped = True
        for pid in pids:
            _ask_to_stop(pid)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for line in _lines(process):
            event = _parse(line)
            match event:
                case None if line:
                    _write(log, line)
                case None:
                    pass
                case {"event": "hello", "pid": pid}:
                    pids.append(pid)
                    if outcome.is_stopped:
                        _ask_to_stop(pid)
                case {"event": "error"}:
                    outcome.errors.append(event)
                case {"event": "failures", "failures": failures}:
                    outcome.killed = _first_killed(failures)
                case _:
                    on_event(event)
    finally:
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        outcome.returncode = process.wait()
        for _ in _lines(process):  # until the last worker has gone
            pass
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return outcome


def _environment(processes: int, *, is_alone: bool) -> dict[str, str]:
    """The workers': this package, whatever lies in the current folder; to each its share of the cores; the loopback device.

    The last two only where nothing else is set.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    if is_alone and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look up the machine's name, which need not resolve
    ours = str(Path(__file__).parents[1])
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))), "PYTHONSAFEPATH": "1"}
    return environment | os.environ | paths


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines of a process and its children, until all have closed the pipe, or it has ended and its children are silent."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([descriptor], [], [], 1.0)[0]:
            if process.poll() is not None:
                break  # a child of a worker lives on and holds the pipe
            continue
        if not (chunk := os.read(descriptor, 1 << 16)):
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _parse(line: str) -> Event | None:
    """The event of a line, None if it is another's line."""
    if not line.startswith(EVENT_PREFIX):
        return None
    try:
        event = json.loads(line.removeprefix(EVENT_PREFIX))
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _write(log: Path, line: str) -> None:
    with suppress(OSError):  # a full disk is reported where it hurts
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(line + "\n")


def _ask_to_stop(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _first_killed(failures: list[tuple[int, int, float]]) -> tuple[int, signal.Signals] | None:
    """Of torchrun's failures (rank, exit code, time): the first that a signal ended and that was not torchrun's doing."""
    begin = min(time for _, _, time in failures)
    for rank, code, time in sorted(failures, key=lambda failure: failure[2]):
        if code < 0 and code != -signal.SIGTERM and time <= begin + COMPANY_SECONDS:
            return rank, signal.Signals(-code)
    return None


# In the workers, and in torchrun


def join() -> Callable[[], bool]:
    """A worker's first act: say hello, and arrange to stop when asked and to die with the stage.

    Returns:
        Whether this worker has been asked to stop.
    """
    _end_with_parent()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    tell("hello", pid=os.getpid())
    return lambda: bool(asked)


def tell(event: str, **values: Any) -> None:
    """Tell the stage something: JSON values. Texts are cut, the oldest part first, so that the line is one whole write."""
    while True:
        text = json.dumps({"event": event, "rank": int(os.environ.get("RANK", -1)), **values})
        line = f"\n{EVENT_PREFIX}{text}\n".encode()  # the newline before it ends what someone else began
        if (excess := len(line) - select.PIPE_BUF) <= 0:
            break
        longest = max((name for name in values if isinstance(values[name], str)), key=lambda name: len(values[name]))
        values[longest] = "…" + values[longest][excess // 2 + 2 :]
    os.write(1, line)


def meaning(error: BaseException) -> dict[str, str | int | None]:
    """What an error of a worker means for the person who started the stage: `kind`, `message`, and what goes with the kind."""
    import torch

    message = str(error)
    core = Path(megatron_core_impl.__file__).parent
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    # By the core's convention a ValueError of its own is the user's to mend; one from a library is a defect of ours.
    if isinstance(error, StageError) or (isinstance(error, ValueError) and raised_in.is_relative_to(core)):
        return {"kind": "bad-input", "message": message}
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in message:
        return {"kind": "memory", "message": message}
    if isinstance(error, OSError) and error.errno is not None:
        file = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else None
        return {"kind": "system", "errno": error.errno, "message": error.strerror, "file": file}
    return {"kind": "crash", "message": f"{type(error).__name__}: {message}"}


def join_group() -> "torch.device":
    """Join the process group, over NCCL with one GPU per worker, or over gloo where there is no GPU. Returns the device.

    Raises:
        BadInput: there are fewer GPUs than workers.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    patience = timedelta(minutes=30)  # for the slowest rank to load, or to write a checkpoint
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=patience)
        return torch.device("cpu")
    needed, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if there < needed:
        raise BadInput(f"layout: its {needed} processes need a GPU each, this machine has {there}. Lower layout.dp, tp or pp")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=patience)
    return device


def _end_with_parent() -> None:
    """See the top of this file. The second way works wherever there are pipes, the first one even when Python is stuck."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> int:
    """torchrun itself, which says what its workers died of."""
    _end_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        tell("failures", failures=[(rank, f.exitcode, f.timestamp) for rank, f in error.failures.items()])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
