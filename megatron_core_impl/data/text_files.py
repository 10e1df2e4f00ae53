"""Files of records, read part by part: JSON lines or a JSON array, plain or compressed (gzip, zstd), and parquet.

A file is cut into parts by a rule that looks at the file only, so that a part is the same whoever reads it: lines by the byte
of the (decompressed) text at which they begin, elements of an array by the character, rows of parquet by their number. A
process reads parts of a file in rising order through one `Reader`, which goes forward only: it decompresses a file once at
most, however many parts it is given, and no more than a block of it is ever in memory. How many parts a compressed file has is
known only at its end: a part that begins behind it is None. A file named `.json` is an array if it begins with a bracket.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from backports import zstd

from megatron_core_impl.data.records import MalformedRecord, Record
from megatron_core_impl.data.text_encoder import name_of

PACKED = (".gz", ".zst")
SUFFIXES = (*(f"{kind}{packed}" for packed in ("", *PACKED) for kind in (".jsonl", ".ndjson", ".json")), ".parquet")
BLOCK_BYTES = 1 << 20  # of text that pass through memory at once
PARTS = 2048  # at most, of all files together, as they lie on disk
MIN_PART_BYTES = 1 << 20
PARQUET_ROWS = 64  # read at a time
ELEMENT_CHARACTERS = 1 << 26  # of one element of an array at most: behind a fault it seems to go on to the end of the file

Row = Record | MalformedRecord | None  # a record, the reason why a line is none, or nothing: a blank line


class UnreadableFile(ValueError):
    """A file that cannot be read to its end; the message names it."""


@dataclass(frozen=True)
class SourceFile:
    """A file of records, and what the person who gave it calls it."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def is_plain(self) -> bool:
        """Whether any part of it can be read without what is before."""
        return self.path.suffix in (".jsonl", ".ndjson")


class Reader(Protocol):
    """Reads parts of a file; their numbers must rise."""

    def blocks(self, part: int) -> Iterator[list[Row]] | None:
        """The rows of a part, some at a time; None if the file ends before it.

        Raises:
            UnreadableFile: the file is damaged or ends early.
        """

    @property
    def share(self) -> float:
        """How much of the file has been read, about: 0 to 1."""

    def close(self) -> None: ...


def part_bytes(files: tuple[SourceFile, ...]) -> int:
    """Size of a part: of the files' sizes alone, so that parts do not depend on how many processes share them."""
    return max(MIN_PART_BYTES, sum(file.size for file in files) // PARTS)


def open_reader(file: SourceFile, size: int, columns: tuple[str, ...], required: tuple[str, ...]) -> Reader:
    """A reader of parts of about `size` bytes. Of parquet only `columns` are read; those `required` must be there.

    Raises:
        UnreadableFile: it is of an unknown kind, damaged, or lacks a column.
    """
    if not file.path.name.endswith(SUFFIXES):
        raise UnreadableFile(f"{file.name}: is of no kind that can be read; those are {', '.join(SUFFIXES)}")
    if file.path.suffix == ".parquet":
        return _ParquetReader(file, size, columns, required)
    text = _Text(file)
    is_array = ".json" in file.path.suffixes[-2:] and text.begins_with(b"[")
    return _ArrayReader(text, size) if is_array else _LineReader(text, size)


def record_of(line: bytes) -> Row:
    """The object in a line of JSON, the reason why there is none, or None for a blank line."""
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return MalformedRecord(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return MalformedRecord(f"not JSON: {_fault(error)} at column {error.colno}") if line.strip() else None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return MalformedRecord(f"not readable JSON: {error}")
    return _row(content)


def _row(content: Any) -> Row:
    return content if isinstance(content, dict) else MalformedRecord(f"{name_of(content)}, not an object")


def _fault(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")


class _Text:
    """An open file of JSON, decompressed."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self._total = file.size
        self._raw: IO[bytes] = file.path.open("rb")
        self.stream: IO[bytes] = self._raw
        if file.path.suffix in PACKED:
            if self._total == 0:
                raise _ends_early(file)  # not even the compressed form of nothing
            is_gzip = file.path.suffix == ".gz"
            self.stream = cast("IO[bytes]", gzip.GzipFile(fileobj=self._raw) if is_gzip else zstd.ZstdFile(self._raw))

    def peek(self, size: int) -> bytes:
        """What comes next, some of it."""
        with _readable(self.file):
            return self.stream.peek(size)  # type: ignore[attr-defined,no-any-return]

    def begins_with(self, character: bytes) -> bool:
        """Whether it is the first that is no white space."""
        return self.peek(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(character)

    @property
    def share(self) -> float:
        return self._raw.tell() / max(1, self._total)

    def close(self) -> None:
        self.stream.close()
        self._raw.close()


class _LineReader:
    """Lines end with \\n and nothing else: other line separators of Unicode may stand inside JSON."""

    def __init__(self, text: _Text, size: int) -> None:
        self._text, self._size = text, size
        self._file, self._stream = text.file, text.stream
        self._position = 0  # in the text: always the beginning of a line

    def blocks(self, part: int) -> Iterator[list[Row]] | None:
        start, stop = part * self._size, (part + 1) * self._size
        with _readable(self._file):
            self._forward(start)
            # The end of an empty file is the end of part 0, not its lack.
            if part and not self._text.peek(1):
                return None
        return self._blocks(stop)

    @property
    def share(self) -> float:
        return self._text.share

    def close(self) -> None:
        self._text.close()

    def _blocks(self, stop: int) -> Iterator[list[Row]]:
        while self._position < stop:
            with _readable(self._file):
                text = self._stream.read(min(BLOCK_BYTES, stop - self._position))
                if not text.endswith(b"\n"):
                    text += self._stream.readline()
            if not text:
                return
            lines = text.removesuffix(b"\n").split(b"\n")
            if self._position == 0:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            self._position += len(text)
            yield [record_of(line) for line in lines]

    def _forward(self, start: int) -> None:
        """Go to the first line that begins at `start` or behind it."""
        if self._position >= start:
            return
        if self._file.is_plain:
            self._stream.seek(start - 1)
        else:
            left = start - 1 - self._position
            while left > 0 and (skipped := len(self._stream.read(min(BLOCK_BYTES, left)))):
                left -= skipped
            if left > 0:
                self._position = start  # the file ended
                return
        self._position = start - 1 + len(self._stream.readline())  # the rest of a line that begins before; \n where none does


class _ArrayReader:
    """Elements of one array, which are decoded as they arrive. Bytes that are no UTF-8 become halves of surrogate pairs, which
    a record is refused for."""

    def __init__(self, text: _Text, size: int) -> None:
        self._source, self._size = text, size
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""  # a window of the file's
        self._before = self._at = 0  # characters before the window; place in it
        self._is_whole = False  # the window reaches to the end of the file
        self._elements = self._read()
        self._next = next(self._elements, None)

    def blocks(self, part: int) -> Iterator[list[Row]] | None:
        while self._next is not None and self._next[0] < part * self._size:
            self._next = next(self._elements, None)
        return None if part and self._next is None else self._blocks((part + 1) * self._size)

    @property
    def share(self) -> float:
        return self._source.share

    def close(self) -> None:
        self._source.close()

    def _blocks(self, stop: int) -> Iterator[list[Row]]:
        while self._next is not None and self._next[0] < stop:
            rows, limit = [], min(stop, self._next[0] + BLOCK_BYTES)
            while self._next is not None and self._next[0] < limit:
                rows.append(self._next[1])
                self._next = next(self._elements, None)
            yield rows

    def _read(self) -> Iterator[tuple[int, Row]]:
        """The elements, each with the place where it begins."""
        self._character()
        self._at += 1  # the bracket
        number, after = 0, "," if self._character() != "]" else "]"
        while after == ",":
            number += 1
            self._character()
            yield self._before + self._at, self._element(number)
            after = self._character()
            if after == ",":
                self._at += 1
        if not after:
            raise _ends_early(self._source.file, "array")
        if after != "]":
            raise self._damaged(f"a comma or the closing bracket must follow record {number:,} of its array, not {after!r}")
        self._at += 1
        if self._character():
            raise self._damaged("its array ends, and something follows")

    def _element(self, number: int) -> Row:
        while True:
            fault, is_cut = "it is too long", True
            try:
                value, end = self._scan(self._text, self._at)
                if end < len(self._text) or self._is_whole:  # else a number may go on
                    self._at = end
                    return _row(value)
            except json.JSONDecodeError as error:  # or only a part of it is here
                fault = _fault(error)
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text.rstrip())
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"record {number:,} of its array is no readable JSON: {error}") from None
            if self._is_whole and is_cut:
                raise _ends_early(self._source.file, "array")
            if self._is_whole or len(self._text) - self._at > ELEMENT_CHARACTERS:
                raise self._damaged(f"record {number:,} of its array is not JSON: {fault}")
            self._more()

    def _character(self) -> str:
        """The next one that is no white space, which stays; "" at the end."""
        while True:
            self._at = _WHITE_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._more()

    def _more(self) -> None:
        """Move the window: twice as much from where it is read."""
        rest = self._text[self._at :]
        with _readable(self._source.file):
            content = self._source.stream.read(max(BLOCK_BYTES, len(rest)))
        self._is_whole = not content
        self._before += self._at
        self._text, self._at = rest + self._decoder.decode(content, final=self._is_whole), 0

    def _damaged(self, fault: str) -> UnreadableFile:
        return UnreadableFile(f"{self._source.file.name}: {fault}. Mend it, or write one JSON object per line")


_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class _ParquetReader:
    def __init__(self, file: SourceFile, size: int, columns: tuple[str, ...], required: tuple[str, ...]) -> None:
        import pyarrow.parquet  # not where it is not needed: it takes 60 MB

        self._file = file
        with _readable(file):
            if file.size == 0:
                raise ValueError("it is empty")
            self._parquet = pyarrow.parquet.ParquetFile(file.path, memory_map=False, pre_buffer=False, buffer_size=1 << 16)
        names = self._parquet.schema_arrow.names
        if missing := [column for column in required if column not in names]:
            raise UnreadableFile(f"{file.name}: has no column {', '.join(map(repr, missing))}; it has: {', '.join(names)}")
        self._columns = [column for column in columns if column in names]
        metadata = self._parquet.metadata
        self._groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._total = metadata.num_rows
        self._rows = max(1, size * self._total // max(1, file.size))  # of a part
        self._batches = self._read()
        self._position = 0  # of the row that comes next
        self._waiting: list[Row] = []
        self._first_group = 0

    def blocks(self, part: int) -> Iterator[list[Row]] | None:
        return (
            self._blocks(part * self._rows, (part + 1) * self._rows) if part == 0 or part * self._rows < self._total else None
        )

    @property
    def share(self) -> float:
        return self._position / max(1, int(self._total))

    def close(self) -> None:
        self._batches.close()
        self._parquet.close()

    def _blocks(self, start: int, stop: int) -> Iterator[list[Row]]:
        self._skip_groups(start)
        while self._position < min(stop, self._total):
            if not self._waiting:
                with _readable(self._file):
                    self._waiting = next(self._batches)
            first = max(0, start - self._position)
            rows = self._waiting[first : stop - self._position]
            self._position += min(len(self._waiting), first + len(rows))
            self._waiting = self._waiting[first + len(rows) :]
            yield rows

    def _skip_groups(self, start: int) -> None:
        """Leave out row groups that end before `start`, where the next row is the first of a group."""
        group = begin = 0
        while group < len(self._groups) and begin + self._groups[group] <= start:
            begin += self._groups[group]
            group += 1
        if begin > self._position:
            self._batches.close()
            self._first_group, self._position, self._waiting = group, begin, []
            self._batches = self._read()

    def _read(self) -> Any:
        groups = range(self._first_group, len(self._groups))
        for batch in self._parquet.iter_batches(
            PARQUET_ROWS, row_groups=list(groups), columns=self._columns, use_threads=False
        ):
            yield _rows(batch)


def _rows(batch: Any) -> list[Row]:
    """The records of a batch. Parquet does not see to it that text is UTF-8."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [MalformedRecord(f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a text")]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """Turns what libraries raise of damaged files into an error that names the file."""
    try:
        yield
    except EOFError:
        raise _ends_early(file) from None
    except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise UnreadableFile(f"{file.name}: is damaged, or not compressed as its name says: {error}") from None
    except (OSError, ValueError) as error:  # pyarrow raises both
        is_of_system = isinstance(error, OSError) and error.errno is not None
        if is_of_system or isinstance(error, UnreadableFile) or file.path.suffix != ".parquet":
            raise
        raise UnreadableFile(f"{file.name}: is no parquet file that can be read: {_one_line(error)}") from None


def _ends_early(file: SourceFile, what: str = "compressed data") -> UnreadableFile:
    return UnreadableFile(f"{file.name}: ends early, in the middle of its {what}: it was cut off. Fetch it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
