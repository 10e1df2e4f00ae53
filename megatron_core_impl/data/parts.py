"""Finished parts of tokenized text on disk, which are later joined to a dataset, and from which interrupted work goes on.

A part is a file of tokens per stream, a file of sizes, and last a report, whose presence says that the part is finished. The
report holds the checksums of the files: after a machine lost power, a part or its report may be named but not written, and is
made again.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_core_impl.data.encoder import Encoded, Encoder
from megatron_core_impl.data.indexed_dataset import BLOCK, IndexWriter, copy_into
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.streams import bin_path

SIZES = ".sizes"  # int32, tokens of each document


@dataclass
class Report:
    """What a part holds."""

    file: int  # number of the source file
    part: int  # number of the part in it
    share: float  # of the source file that has been read after it, about
    statistics: Statistics
    dtypes: dict[str, str]  # of the streams' tokens, by suffix
    ends_documents: bool
    malformed: list[tuple[int, str]] = field(default_factory=list)  # (row within the part, from 0; reason)
    checks: dict[str, tuple[int, int]] = field(default_factory=dict)  # file's ending -> bytes, CRC-32

    @property
    def name(self) -> str:
        """What the names of its files begin with; they sort in the order of the text."""
        return part_name(self.file, self.part)


def part_name(file: int, part: int) -> str:
    """What the names of a part's files begin with."""
    return f"{file:07}-{part:07}"


class PartWriter:
    """Writes a part, a chunk of records at a time."""

    def __init__(self, folder: Path, file: int, part: int, encoder: Encoder) -> None:
        self._folder = folder
        self.report = Report(
            file,
            part,
            0.0,
            Statistics(),
            {suffix: dtype.name for suffix, dtype in encoder.dtypes.items()},
            encoder.ends_documents,
        )
        self._files: dict[str, IO[bytes]] = {}
        for ending in (*map(_tokens_of, encoder.dtypes), SIZES):
            self._files[ending] = (folder / f"{self.report.name}{ending}").open("wb")
            self.report.checks[ending] = (0, 0)

    def add(self, encoded: Encoded) -> None:
        """Append documents and count them."""
        limits = np.iinfo(np.int32)
        if len(encoded.sizes) and encoded.sizes.max() > limits.max:
            raise ValueError(f"a document has {encoded.sizes.max():,} tokens; the format holds at most {limits.max:,}")
        for suffix, tokens in encoded.streams.items():
            dtype = np.dtype(self.report.dtypes[suffix])
            if len(tokens) and tokens.dtype != dtype and not 0 <= tokens.min() <= tokens.max() <= np.iinfo(dtype).max:
                raise ValueError(f"token ids {tokens.min():,} to {tokens.max():,} do not fit {dtype.name}")
            self._write(_tokens_of(suffix), tokens.astype(dtype.newbyteorder("<"), copy=False).tobytes())
        self._write(SIZES, encoded.sizes.astype("<i4").tobytes())
        statistics = self.report.statistics
        statistics.count_documents(encoded.sizes)
        statistics.empty += encoded.empty
        statistics.left_out.update(encoded.left_out)

    def finish(self) -> Report:
        """Close the files and write the report."""
        self.close()
        report = self.report
        report.statistics.malformed = len(report.malformed)
        values = vars(report) | {"statistics": report.statistics.to_json()}
        file = self._folder / f"{report.name}.json"
        unfinished = file.with_suffix(".new")
        unfinished.write_text(json.dumps(values))
        unfinished.replace(file)
        return report

    def close(self) -> None:
        """Close the files without a report: the part will be made again."""
        for file in self._files.values():
            file.close()

    def _write(self, ending: str, content: bytes) -> None:
        self._files[ending].write(content)
        size, check = self.report.checks[ending]
        self.report.checks[ending] = (size + len(content), zlib.crc32(content, check))


def report_files(folder: Path) -> list[Path]:
    """The files of the reports of a folder's parts, in the order of the text."""
    return sorted(folder.glob("*.json"))


def read_report(file: Path) -> Report:
    """What `PartWriter.finish` wrote.

    Raises:
        ValueError: it is not whole.
    """
    values = json.loads(file.read_bytes())
    try:
        statistics = Statistics.from_json(values.pop("statistics"))
        return Report(**values | {"malformed": [(row, reason) for row, reason in values["malformed"]]}, statistics=statistics)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report: {error!r}") from error


def finished_part(folder: Path, file: Path) -> Report | None:
    """The report of a part, or None where it or the part's files are not as they were written."""
    try:
        report = read_report(file)
    except ValueError:
        return None
    return report if is_intact(folder, report) else None


def is_intact(folder: Path, report: Report) -> bool:
    """Whether a part's files are as they were written."""
    for ending, (size, expected) in report.checks.items():
        path = folder / f"{report.name}{ending}"
        if not path.is_file() or path.stat().st_size != size:
            return False
        check = 0
        with path.open("rb") as file:
            while content := file.read(BLOCK):
                check = zlib.crc32(content, check)
        if check != expected:
            return False
    return True


def join_parts(folder: Path, prefix: Path) -> Statistics:
    """Make the datasets `<prefix><suffix>.bin/.idx` of all parts of a folder, and count what is in them.

    Nothing but a block of the index passes through memory: tokens are copied by the kernel.
    """
    total, dtypes, ends_documents = Statistics(), dict[str, Any](), True
    names: list[str] = []
    for report in map(read_report, report_files(folder)):
        total.add(report.statistics)
        dtypes, ends_documents = report.dtypes, report.ends_documents
        names.append(report.name)
    documents = total.documents if ends_documents else 0
    for suffix, dtype in dtypes.items():
        output = Path(f"{prefix}{suffix}")
        with bin_path(output).open("wb") as tokens:
            for name in names:
                copy_into(tokens, folder / f"{name}{_tokens_of(suffix)}")
        with IndexWriter(output, np.dtype(dtype).newbyteorder("<"), total.documents, documents + 1) as index:
            for name in names:
                with (folder / f"{name}{SIZES}").open("rb") as sizes:
                    while block := sizes.read(4 * BLOCK):
                        index.add_sizes(np.frombuffer(block, "<i4"))
            for start in range(0, documents, BLOCK):
                index.add_doc_idx(np.arange(start + 1, min(documents, start + BLOCK) + 1))
    return total


def _tokens_of(suffix: str) -> str:
    return f"{suffix}.tokens"
