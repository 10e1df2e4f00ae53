"""Files of records to datasets, in several processes, in constant memory, the result independent of how many.

The files are cut into parts (`text_files`). Each worker process reads, tokenizes and writes parts by itself, whichever is next;
only a report of each comes back. In the end the parts are joined by copying (`parts.join_parts`). Parts that are finished stay
when the work is interrupted, and whoever does the same job again in the same folder goes on from them.

The processes belong to the one that starts them. They are deaf to Ctrl-C and SIGTERM, which reach the whole process group:
the parent kills them when it stops, and if the parent itself is killed, they find its end of the pipe closed and leave.
"""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megatron_core_impl.data.encoder import Recipe
from megatron_core_impl.data.parts import Report, finished_part, join_parts, report_files
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.text_files import SourceFile, UnreadableFile, part_bytes
from megatron_core_impl.data.worker import Answer, Ended, Failed, Work

AHEAD = 2  # parts given to a process at a time, so that it need not wait for the parent
WINDOW = 16  # parts per process that may be under way or waiting for an earlier one


class WorkerDied(RuntimeError):
    """A process ended before its work; the message says how."""


@dataclass(frozen=True)
class Job:
    """What to make datasets of, and how."""

    files: tuple[SourceFile, ...]
    recipe: Recipe
    prefix: Path  # of the datasets: `<prefix><suffix>.bin` and `.idx`
    part_bytes: int | None = None  # None: by the size of the files

    @property
    def work(self) -> Work:
        """The same for the processes."""
        size = self.part_bytes or part_bytes(self.files)
        stats = [(file.name, str(file.path), file.path.stat()) for file in self.files]
        identity = repr((self.recipe, size, [(name, path, s.st_size, s.st_mtime_ns) for name, path, s in stats]))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Work(self.files, size, self.recipe, self.prefix.parent / f"{self.prefix.name}.parts-{digest}")


@dataclass(frozen=True)
class Progress:
    """A part that is finished."""

    report: Report
    first_row: int  # of the part, counted over the source file from 0
    share: float  # of all files, by their bytes, that is finished up to here
    is_new: bool  # False: it was there from before

    @property
    def malformed(self) -> list[tuple[int, str]]:
        """(row of the source file, from 1; reason)."""
        return [(self.first_row + row + 1, reason) for row, reason in self.report.malformed]


def tokenize(
    job: Job, workers: int, checked: Callable[[int, int], None] = lambda done, total: None
) -> Generator[Progress, None, None]:
    """Make all parts of a job, and tell of them in the order of the text. Close the generator to end its processes early.

    Args:
        checked: is told how many of the parts that are there from before have been read and compared with their checksums.

    Raises:
        UnreadableFile: a file cannot be read to its end.
        OSError: a process met it, say a disk that is full. Finished parts stay.
        WorkerDied: a process was killed, or could not start.
        RuntimeError: a process met a defect; the message holds its traceback.
    """
    work = job.work
    for other in job.prefix.parent.glob(f"{job.prefix.name}.parts-*"):
        if other != work.folder:
            shutil.rmtree(other)
    work.folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[int, int], Report] = {}
    reports = report_files(work.folder)
    for done, file in enumerate(reports, start=1):
        if finished := finished_part(work.folder, file):
            found[finished.file, finished.part] = finished
        else:
            file.unlink()
        checked(done, len(reports))
    plan, ready = _Plan(job.files, work.part_bytes, set(found)), dict[tuple[int, int], Report]()
    before, share, total = 0, 0.0, max(1, sum(file.size for file in job.files))
    with _started(work, min(workers, plan.left())) as processes:
        free = deque(list(processes) * AHEAD)
        for number, source in enumerate(job.files):
            rows = 0
            for part in itertools.count():
                place = (number, part)
                while place not in found and place not in ready and part < plan.ends[number]:
                    while free and len(ready) < WINDOW * len(processes) and (asked := plan.next()):
                        _send(free.popleft(), asked, processes)
                    for connection in wait(list(processes)):
                        assert isinstance(connection, Connection)
                        made = _receive(connection, processes)
                        free.append(connection)
                        if isinstance(made, Ended):
                            plan.ends[made.file] = min(plan.ends[made.file], made.part)
                        else:
                            ready[made.file, made.part] = made
                if part >= plan.ends[number]:
                    break
                report = found.pop(place) if place in found else ready.pop(place)
                share = max(share, (before + report.share * source.size) / total)
                yield Progress(report, rows, share, is_new=place not in plan.found)
                rows += report.statistics.rows
            before += source.size


class _Plan:
    """Which part is made next: in the order of the text, without those that are found finished."""

    def __init__(self, files: tuple[SourceFile, ...], size: int, found: set[tuple[int, int]]) -> None:
        self.found = found
        # Parts of each file; of a plain one they are known beforehand, of the others when a process meets the end.
        self.ends = [max(1, -(-file.size // size)) if file.is_plain else sys.maxsize for file in files]
        self._file = self._part = 0

    def next(self) -> tuple[int, int] | None:
        """The next part to make, None if there is none any more."""
        while self._file < len(self.ends):
            if self._part >= self.ends[self._file]:
                self._file, self._part = self._file + 1, 0
                continue
            asked = self._file, self._part
            self._part += 1
            if asked not in self.found:
                return asked
        return None

    def left(self) -> int:
        """How many parts are to be made, at most."""
        return max(0, sum(self.ends) - len(self.found))


def join(job: Job) -> Statistics:
    """Make the datasets of a job whose parts are all there. The parts stay."""
    return join_parts(job.work.folder, job.prefix)


def remove_parts(job: Job) -> None:
    """Remove the parts of this job and of others that had its prefix."""
    for folder in job.prefix.parent.glob(f"{job.prefix.name}.parts-*"):
        shutil.rmtree(folder)


Processes = dict[Connection, subprocess.Popen[bytes]]


@contextmanager
def _started(work: Work, workers: int) -> Iterator[Processes]:
    """Processes at work, by the parent's end of their pipes. None is left when the context ends, however it ends."""
    processes: Processes = {}
    # They find what this process finds, from wherever it was started.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # children inherit this
    try:
        try:
            for _ in range(workers):
                ours, theirs = multiprocessing.Pipe()
                command = [sys.executable, "-m", "megatron_core_impl.data.worker", str(theirs.fileno())]
                processes[ours] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=environment
                )
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        for connection in processes:
            _send(connection, work, processes)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        for connection in processes:
            connection.close()


def _send(connection: Connection, message: Work | tuple[int, int], processes: Processes) -> None:
    try:
        connection.send(message)
    except ConnectionError:
        raise _death(processes[connection]) from None


def _receive(connection: Connection, processes: Processes) -> Report | Ended:
    try:
        answer: Answer = connection.recv()
    except (EOFError, ConnectionError):
        raise _death(processes[connection]) from None
    if isinstance(answer, OSError):
        raise answer
    if isinstance(answer, Failed):
        if answer.is_defect:
            raise RuntimeError(f"tokenizing failed in a worker process:\n{answer.message}")
        raise UnreadableFile(answer.message)
    return answer


def _death(process: subprocess.Popen[bytes]) -> WorkerDied:
    """How a process ended."""
    code = process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return WorkerDied(f"worker process {process.pid} {how}")
