"""JSON lines to token ids in several processes, the result independent of how many.

The file is cut into byte ranges; a range's lines are tokenized by whichever process is free; the results come back in the
file's order. Only a window of ranges is under way at a time, so memory is constant.

The processes belong to the one that starts them. They are deaf to Ctrl-C and SIGTERM, which reach the whole process group:
the parent kills them when it stops, and if the parent itself is killed, they find its end of the pipe closed and leave.
"""

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import Tokens
from megatron_core_impl.data.jsonl import MalformedLine, read_lines, text_of
from megatron_core_impl.data.tokenizer import Kind, Tokenizer, load_tokenizer

CHUNK_BYTES = 1 << 20  # of text per range: some 0.3 s of work
AHEAD = 2  # ranges given to a process at a time, so that it need not wait for the parent
WINDOW = 4  # ranges per process that may be under way or waiting for an earlier one


class WorkerDied(RuntimeError):
    """A process ended before its work; the message says how."""


@dataclass(frozen=True)
class Job:
    """What to tokenize, and how."""

    file: Path  # JSON lines
    tokenizer: Path  # folder
    kind: Kind | Literal["auto"]
    append_eod: bool
    dtype: np.dtype[Any]  # of the tokens
    parse_special: bool = False  # see load_tokenizer
    chunk_bytes: int = CHUNK_BYTES

    @property
    def num_chunks(self) -> int:
        return -(-self.file.stat().st_size // self.chunk_bytes)


@dataclass
class Chunk:
    """The documents of one byte range."""

    number: int
    tokens: Tokens  # one document after another
    sizes: npt.NDArray[np.int64]  # tokens of each document
    lines: int
    empty: int  # lines whose text has no tokens: left out, as by the reference
    malformed: list[tuple[int, str]] = field(default_factory=list)  # (line within the range, from 1; reason)


def tokenize_chunk(job: Job, tokenizer: Tokenizer, number: int) -> Chunk:
    """Tokenize the lines that begin in the number-th range of the file."""
    lines = read_lines(job.file, number * job.chunk_bytes, (number + 1) * job.chunk_bytes)
    texts: list[str] = []
    malformed: list[tuple[int, str]] = []
    for line_number, line in enumerate(lines, 1):
        try:
            texts.append(text_of(line))
        except MalformedLine as error:
            malformed.append((line_number, str(error)))
    documents = [ids for ids in tokenizer.encode_batch(texts) if ids]
    if job.append_eod:
        assert tokenizer.eod_id is not None
        for ids in documents:
            ids.append(tokenizer.eod_id)
    sizes = np.array([len(ids) for ids in documents], np.int64)
    tokens = np.fromiter(chain.from_iterable(documents), job.dtype, int(sizes.sum()))  # OverflowError if an id does not fit
    return Chunk(number, tokens, sizes, len(lines), len(texts) - len(documents), malformed)


def tokenize_file(job: Job, workers: int) -> Generator[Chunk, None, None]:
    """The chunks of a file, in order. Close the generator to end its processes early.

    Raises:
        WorkerDied: a process was killed, or could not start.
        RuntimeError: a process met a defect; the message holds its traceback.
    """
    count = job.num_chunks
    ready: dict[int, Chunk] = {}
    given = wanted = 0
    with _started(job, min(workers, count)) as processes:
        free = deque(list(processes) * AHEAD)
        while wanted < count:
            while free and given < min(count, wanted + WINDOW * len(processes)):
                _send(free.popleft(), given, processes)
                given += 1
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                chunk = _receive(connection, processes)
                ready[chunk.number] = chunk
                free.append(connection)
            while wanted in ready:
                yield ready.pop(wanted)
                wanted += 1


Processes = dict[Connection, BaseProcess]


@contextmanager
def _started(job: Job, workers: int) -> Iterator[Processes]:
    """Processes at work, by the parent's end of their pipes. None is left when the context ends, however it ends."""
    # Not forked: the parent may have threads, and a child must not hold the pipes of the others open.
    context = multiprocessing.get_context("spawn")
    processes: Processes = {}
    resource_tracker.ensure_running()  # now, since starting it unblocks the signals that are blocked next
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # children inherit this
    try:
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=_work, args=(theirs, job), daemon=True)
                processes[ours] = process
                process.start()
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        yield processes
    finally:
        for process in processes.values():
            if process.pid is not None:
                process.kill()
                process.join()
        for connection in processes:
            connection.close()


def _work(connection: Connection, job: Job) -> None:
    """A process: tokenize the ranges asked for, until the parent closes the pipe or is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = load_tokenizer(job.tokenizer, job.kind, parse_special=job.parse_special)
    while True:
        try:
            number = connection.recv()
        except (EOFError, ConnectionError):
            return
        result: Chunk | str
        try:
            result = tokenize_chunk(job, tokenizer, number)
        except Exception:
            result = traceback.format_exc()
        try:
            connection.send(result)
        except ConnectionError:
            return


def _send(connection: Connection, number: int, processes: Processes) -> None:
    try:
        connection.send(number)
    except ConnectionError:
        raise _death(processes[connection]) from None


def _receive(connection: Connection, processes: Processes) -> Chunk:
    try:
        result = connection.recv()
    except (EOFError, ConnectionError):
        raise _death(processes[connection]) from None
    if isinstance(result, str):
        raise RuntimeError(f"tokenizing failed in a worker process:\n{result}")
    assert isinstance(result, Chunk)
    return result


def _death(process: BaseProcess) -> WorkerDied:
    """How a process ended."""
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return WorkerDied(f"worker process {process.pid} {how}")
