"""Tokens on disk in Megatron's `.bin`/`.idx` format, byte for byte what Megatron-LLM and Megatron-LM write and read.

`<prefix>.bin` holds the tokens of all sequences, one after another. `<prefix>.idx` says where each lies (little endian):

| bytes | field |
|---|---|
| 9 | `MMIDIDX` and two zero bytes |
| 8 | u64 version = 1 |
| 1 | u8 code of the tokens' type (`DTYPES`) |
| 8 | u64 N, number of sequences |
| 8 | u64 D, length of doc_idx |
| 4 N | int32 sizes: tokens of each sequence |
| 8 N | int64 pointers: byte at which each sequence starts in `.bin` |
| 8 D | int64 doc_idx: 0, then after each document the number of sequences so far |

A document of plain text is one sequence. Reading maps both files into memory; writing keeps nothing in memory.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.streams import bin_path, idx_path

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"), 2: np.dtype("<i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"), 7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20  # entries of an index that pass through memory at once
COPIED = 1 << 26  # bytes that the kernel copies in one call

Tokens = npt.NDArray[np.integer[Any]]


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type in which the reference stores ids of a vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """A dataset, memory-mapped: `dataset[i]` is the tokens of sequence i, read-only, in the type they are stored in.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is not what the format says; the message names it.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        idx = idx_path(prefix)
        index = _map(idx, np.dtype("u1"))
        self.dtype, num_sequences, len_doc_idx = _read_header(idx, index)
        sizes_end = HEADER.size + 4 * num_sequences
        self.sizes: npt.NDArray[np.int32] = np.frombuffer(index, "<i4", num_sequences, HEADER.size)  # [N] tokens
        self.pointers: npt.NDArray[np.int64] = np.frombuffer(index, "<i8", num_sequences, sizes_end)  # [N] bytes
        self.doc_idx: npt.NDArray[np.int64] = np.frombuffer(index, "<i8", len_doc_idx, sizes_end + 8 * num_sequences)
        self._check(idx, bin_path(prefix).stat().st_size)
        self.tokens: Tokens = _map(bin_path(prefix), self.dtype)  # of all sequences, as they lie in the .bin

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Tokens:
        """Tokens of sequence i, [sizes[i]]."""
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.prefix,)  # another process maps the files itself

    def _check(self, idx: Path, bin_bytes: int) -> None:
        """Refuse an index that points outside its files."""
        for start in range(0, len(self.sizes), BLOCK):
            sizes = self.sizes[start : start + BLOCK].astype(np.int64)
            pointers = self.pointers[start : start + BLOCK]
            room = bin_bytes - pointers  # cannot overflow, as the end of a sequence could
            wrong = (sizes < 0) | (pointers < 0) | (pointers % self.dtype.itemsize != 0)
            wrong |= sizes * self.dtype.itemsize > room
            if wrong.any():
                i = int(wrong.argmax())
                raise ValueError(
                    f"{idx}: sequence {start + i:,} is said to be {sizes[i]:,} {self.dtype.name} tokens at byte "
                    f"{pointers[i]:,} of a .bin of {bin_bytes:,} bytes: the two files do not belong together, "
                    "or one is damaged. Make them again"
                )
        documents = self.doc_idx
        if len(documents) == 0 or documents[0] != 0 or documents[-1] > len(self) or (documents[1:] < documents[:-1]).any():
            raise ValueError(f"{idx}: doc_idx must rise from 0 to at most {len(self):,} sequences. Make the dataset again")


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The content of a file, read-only. An empty file cannot be mapped, but is a legal .bin."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # Viewed as a plain array: slicing a memmap makes another memmap each time, which costs more than the read.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,)))


def _read_header(idx: Path, index: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """(type of the tokens, N, D) of an index, its length checked."""
    start = index[: HEADER.size].tobytes()
    if start.startswith(OLD_MAGIC):
        raise ValueError(f"{idx}: is in the old TNTIDX format of fairseq; tokenize the text again")
    if len(start) < HEADER.size or not start.startswith(MAGIC):
        raise ValueError(f"{idx}: is not the index of a Megatron dataset: it does not start with MMIDIDX")
    _, version, code, num_sequences, len_doc_idx = HEADER.unpack(start)
    if version != VERSION:
        raise ValueError(f"{idx}: has version {version} of the format, only {VERSION} is known")
    if code not in DTYPES:
        legal = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise ValueError(f"{idx}: has tokens of type code {code}; ids are one of {legal}")
    expected = HEADER.size + 12 * num_sequences + 8 * len_doc_idx
    if len(index) != expected:
        raise ValueError(
            f"{idx}: has {len(index):,} bytes, but {num_sequences:,} sequences and {len_doc_idx:,} entries of doc_idx take "
            f"{expected:,}: it was cut off or damaged. Make the dataset again"
        )
    return DTYPES[code], num_sequences, len_doc_idx


def copy_into(target: IO[bytes], source: Path) -> None:
    """Append a file to an open one, inside the kernel."""
    target.flush()
    with source.open("rb") as file:
        offset, size = 0, source.stat().st_size
        while offset < size:
            copied = os.sendfile(target.fileno(), file.fileno(), offset, min(COPIED, size - offset))
            if copied == 0:
                raise ValueError(f"{source}: became shorter while it was copied")
            offset += copied


class IndexWriter:
    """Writes an index whose length is known, block by block, each part of it at its own place: nothing waits in memory.

    A context manager: it is an error of the caller to leave it before all is written.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any], num_sequences: int, len_doc_idx: int) -> None:
        self._itemsize = dtype.itemsize
        self._token = 0  # at which the next sequence begins
        places = (HEADER.size, HEADER.size + 4 * num_sequences, HEADER.size + 12 * num_sequences)
        idx_path(prefix).write_bytes(HEADER.pack(MAGIC, VERSION, CODES[dtype], num_sequences, len_doc_idx))
        self._files = [idx_path(prefix).open("r+b") for _ in places]
        for file, place in zip(self._files, places, strict=True):
            file.seek(place)
        self._sizes, self._pointers, self._doc_idx = self._files
        self._doc_idx.write(bytes(8))

    def add_sizes(self, sizes: npt.NDArray[np.int32]) -> None:
        """Append sequences: how many tokens each has."""
        # In int64: the reference's merge tool overflows int32 beyond 2 GiB.
        ends = self._token + np.cumsum(sizes, dtype=np.int64)
        self._sizes.write(sizes.astype("<i4", copy=False).tobytes())
        self._pointers.write(((ends - sizes) * self._itemsize).astype("<i8").tobytes())
        self._token = int(ends[-1]) if len(ends) else self._token

    def add_doc_idx(self, ends: npt.NDArray[np.int64]) -> None:
        """Append documents: how many sequences there are up to the end of each. The first 0 is there already."""
        self._doc_idx.write(ends.astype("<i8", copy=False).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()
