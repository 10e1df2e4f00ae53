"""A process that makes parts: `python -m megatron_core_impl.data.worker FD`, started by `preprocessing` only.

It is a program of its own, not a fork or a copy of the parent's main module, so that it loads what it needs and nothing else.
It gets a job and then (file, part) pairs through the pipe FD, and answers each. When the pipe closes, because the parent is
done or gone, it leaves at once, in the middle of a part if need be.
"""

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron_core_impl.data.encoder import Encoder, Recipe
from megatron_core_impl.data.parts import PartWriter, Report
from megatron_core_impl.data.records import MalformedRecord
from megatron_core_impl.data.text_files import Reader, SourceFile, UnreadableFile, open_reader


@dataclass(frozen=True)
class Work:
    """What all parts have in common."""

    files: tuple[SourceFile, ...]
    part_bytes: int
    recipe: Recipe
    folder: Path  # of the parts


@dataclass(frozen=True)
class Ended:
    """The answer to a part that begins behind the end of its file."""

    file: int
    part: int


@dataclass(frozen=True)
class Failed:
    """The answer to a part that cannot be made: a person's file is unreadable, or, with a traceback, a defect of ours."""

    message: str
    is_defect: bool


Answer = Report | Ended | Failed | OSError  # a machine that lacks something is no defect: who asked tells of it


class PartMaker:
    """Makes parts of a job; their numbers must rise."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._encoder: Encoder = work.recipe.encoder()
        self._reader: Reader | None = None
        self._file = -1

    def make(self, file: int, part: int) -> Report | Ended:
        """Tokenize a part and write it.

        Raises:
            UnreadableFile: the source file is damaged.
        """
        if self._reader is None or file != self._file:
            if self._reader is not None:
                self._reader.close()
            source, encoder = self._work.files[file], self._encoder
            self._reader, self._file = None, file
            self._reader = open_reader(source, self._work.part_bytes, encoder.columns, encoder.required)
        blocks = self._reader.blocks(part)
        if blocks is None:
            return Ended(file, part)
        writer = PartWriter(self._work.folder, file, part, self._encoder)
        report, statistics = writer.report, writer.report.statistics
        try:
            for block in blocks:
                records, places = [], []  # of those that are records, their rows within the part
                for row, record in enumerate(block, statistics.rows):
                    if record is None:
                        statistics.blank += 1
                    elif isinstance(record, MalformedRecord):
                        report.malformed.append((row, str(record)))
                    else:
                        records.append(record)
                        places.append(row)
                encoded = self._encoder.encode(records)
                writer.add(encoded)
                report.malformed += [(places[i], reason) for i, reason in encoded.malformed]
                statistics.rows += len(block)
            report.share = self._reader.share
            report.malformed.sort()
            return writer.finish()
        finally:
            writer.close()


def main(connection: Connection) -> None:
    """Make what is asked for until the pipe closes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    asked: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                asked.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    maker = PartMaker(asked.get())
    while True:
        file, part = asked.get()
        answer: Answer
        try:
            answer = maker.make(file, part)
        except UnreadableFile as error:
            answer = Failed(str(error), is_defect=False)
        except OSError as error:
            answer = error
        except Exception:
            answer = Failed(traceback.format_exc(), is_defect=True)
        try:
            connection.send(answer)
        except OSError:  # the parent is gone, and the other thread, which may have seen it too, ends the process as well:
            os._exit(0)  # an interpreter that is taken down meanwhile would say so


if __name__ == "__main__":
    # Under its own name, which its answers must carry to be known to the parent.
    from megatron_core_impl.data import worker

    worker.main(Connection(int(sys.argv[1])))
