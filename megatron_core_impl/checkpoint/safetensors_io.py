"""Safetensors files, read and written slice by slice in constant memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the little-endian length N of the header; N bytes of
JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {string: string}}`, padded with spaces to a
multiple of 8; then the data, row-major and little-endian, without holes. Offsets count from the end of the header.

Files are read with `pread`, never mapped: a slice costs its own bytes, and neither memory nor a descriptor outlives a call.
Numbers are bytes here (`dtypes`); PyTorch is needed by whoever asks for a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from blake3 import blake3

from megatron_core_impl.checkpoint.digests import FileDigest, Follower, file_blake3
from megatron_core_impl.checkpoint.dtypes import DTYPES, Bytes, Dtype, as_bytes, dtype_of
from megatron_core_impl.checkpoint.durable import begin_write_back
from megatron_core_impl.checkpoint.slicing import BLOCK_BYTES, Slice, shape_of, whole
from megatron_core_impl.checkpoint.source import TensorFile
from megatron_core_impl.shown import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the `safetensors` library's own limit
WRITE_BACK_BYTES = 64 << 20  # so much of a file is written before the kernel is told to send it to the disk
SKIPPED_BYTES = 8 << 10  # what a call of pread costs: gaps between columns that are shorter are read over, not jumped over


class WeightsError(ValueError):
    """Stored weights that cannot be used: missing, malformed or not what is asked for. The message names the file."""


class SafetensorsReader(TensorFile):
    """One safetensors file: its header, and its tensors by slices.

    Raises:
        WeightsError: the file is missing, or its header is malformed or does not describe its data exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}  # name -> position of its data in the file
        self._read_header()

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a tensor, or of a slice of it, as stored.

        Raises:
            WeightsError: the tensor is not in the file, the slice is not in the tensor, or the file became shorter.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: holds no tensor {name}")
        dtype, shape = self.tensors[name]
        piece = whole(shape) if piece is None else piece
        check_slice(f"{self.path}: {name}", shape, piece)
        out: Bytes = np.empty((*shape_of(piece), dtype.itemsize), np.uint8)
        if out.size:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                self._read_slice(descriptor, out.reshape(-1), self._offsets[name], shape, piece, dtype.itemsize)
            finally:
                os.close(descriptor)
        return out

    def _read_slice(
        self, descriptor: int, out: Bytes, offset: int, shape: tuple[int, ...], piece: Slice, itemsize: int
    ) -> None:
        """Fill `out` with a slice of the tensor that starts at `offset`.

        Dims after the last one that is cut are whole, so the slice is a set of equally long runs: one run where only dim 0
        is cut, and otherwise one per index of the dims before, that is the columns of one or more matrices.
        """
        cut = max((dim for dim, size in enumerate(shape) if piece[dim] != (0, size)), default=0)
        inner = math.prod(shape[cut + 1 :]) * itemsize  # bytes per index of the cut dim
        start, stop = piece[cut] if shape else (0, 1)
        if cut == 0:
            self._pread(descriptor, out, offset + start * inner)
            return
        row = shape[cut] * inner
        first, last = piece[cut - 1]
        matrices = out.reshape(-1, last - first, (stop - start) * inner)
        for columns, outer in zip(matrices, product(*(range(*bounds) for bounds in piece[: cut - 1])), strict=True):
            index = 0
            for number, size in zip(outer, shape[: cut - 1], strict=True):
                index = index * size + number
            begin = offset + (index * shape[cut - 1] + first) * row
            self._read_columns(descriptor, columns, begin, row, start * inner)

    def _read_columns(self, descriptor: int, out: Bytes, offset: int, row: int, first: int) -> None:
        """Fill `out` [rows, width] with the bytes first … first+width of each row of `row` bytes, from `offset` on."""
        rows, width = out.shape
        if row - width >= SKIPPED_BYTES or rows == 1:
            for number in range(rows):
                self._pread(descriptor, out[number], offset + number * row + first)
            return
        per_block = max(1, BLOCK_BYTES // row)
        for number in range(0, rows, per_block):
            count = min(per_block, rows - number)
            block = np.empty((count, row), dtype=np.uint8)
            self._pread(descriptor, block.reshape(-1), offset + number * row)
            out[number : number + count] = block[:, first : first + width]

    def _pread(self, descriptor: int, out: Bytes, offset: int) -> None:
        view = out.data
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise WeightsError(f"{self.path}: is truncated: it ends at byte {offset:,}, inside its data")
            view, offset = view[count:], offset + count

    def _read_header(self) -> None:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise WeightsError(
                        f"{self.path}: is truncated or no safetensors file: {size:,} bytes cannot hold its header"
                    )
                if length > MAX_HEADER_BYTES:
                    raise WeightsError(f"{self.path}: header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are legal")
                header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        except FileNotFoundError:
            raise WeightsError(f"{self.path}: no such file") from None
        except WeightsError:
            raise
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{self.path}: no safetensors file: its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise WeightsError(f"{self.path}: no safetensors file: its header is not a JSON object")
        self._take_header(header, data_bytes=size - 8 - length, data_start=8 + length)

    def _take_header(self, header: dict[str, Any], *, data_bytes: int, data_start: int) -> None:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError(f"{self.path}: __metadata__ of the header must map strings to strings")
        self.metadata = metadata
        spans = []
        for name, entry in header.items():
            dtype, shape, begin, end = self._take_entry(name, entry)
            self.tensors[name] = (dtype, shape)
            self._offsets[name] = data_start + begin
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
                raise WeightsError(f"{self.path}: {name}: data_offsets [{begin}, {end}] {fault}")
            position = end
        if position != data_bytes:
            fault = "is truncated" if position > data_bytes else "has bytes that no tensor owns"
            raise WeightsError(f"{self.path}: {fault}: its header describes {position:,} bytes of data, it has {data_bytes:,}")

    def _take_entry(self, name: str, entry: Any) -> tuple[Dtype, tuple[int, ...], int, int]:
        """(dtype, shape, begin, end) of a tensor in the header."""
        where = f"{self.path}: {name}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise WeightsError(f"{where}: must have dtype, shape and data_offsets in the header")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise WeightsError(f"{where}: dtype {shown(code)} is unknown; known: {', '.join(DTYPES)}")
        if not _are_counts(shape):
            raise WeightsError(f"{where}: shape {shown(shape)} must be a list of sizes")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise WeightsError(f"{where}: data_offsets {shown(offsets)} must be [begin, end]")
        needed = math.prod(shape) * DTYPES[code].itemsize
        if offsets[1] - offsets[0] != needed:
            raise WeightsError(
                f"{where}: data_offsets {offsets} hold {offsets[1] - offsets[0]:,} bytes, {code} {shape} needs {needed:,}"
            )
        return DTYPES[code], tuple(shape), offsets[0], offsets[1]


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor or row by row, in any order. Use it as a context manager.

    The file is complete when the block ends, and on its way to the disk: whoever publishes it waits for that (`durable`).
    When the block fails, the file is removed.

    It has its full length from the start, so its header can be read, and each tensor as soon as it was written. No descriptor
    is held: a checkpoint of many ranks is written into more files at a time than a process may have open.

    Its digest is taken while it is written, in a second thread, from the bytes in memory. That needs the order of the file,
    which is that of `names`; what was written in another order is read again in the end. A tensor that was given must not
    change before the block ends.

    Args:
        path: the file to make; one that is there is replaced.
        entries: (name, dtype, shape) of every tensor that will be written.
        metadata: strings for the header.
        follower: the second thread, where several files share one.
    """

    def __init__(
        self,
        path: Path,
        entries: Iterable[tuple[str, torch.dtype | Dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.path = path
        self._entries: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
        for name, given, shape in entries:
            try:
                dtype = given if isinstance(given, Dtype) else dtype_of(given)
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
            if name in self._entries:
                raise ValueError(f"{path}: {name}: given twice")
            self._entries[name] = (dtype, tuple(shape))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        position = 0
        # Wide dtypes first: then every tensor lies at a multiple of its item size, as readers that map the file need it.
        for name, (dtype, shape) in sorted(self._entries.items(), key=lambda item: -item[1][0].itemsize):
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [position, end]}
            self._offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: header of {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are legal")
        self._data_start = 8 + len(text)
        self._missing = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in self._entries.items()}
        self._digest: FileDigest | None = None
        self._end = 0  # of what was written without a gap, front to back
        self._sent = 0  # what the kernel was told to send to the disk
        self._blake3 = blake3()
        self._follower = Follower() if follower is None else follower
        self._shares_follower = follower is not None
        try:
            path.write_bytes(b"")
            os.truncate(path, self._data_start + position)
            self._pwrite(len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            self._abandon()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors in the order of the file: those of wide dtypes first."""
        return tuple(self._offsets)

    @property
    def digest(self) -> FileDigest:
        """Size and digest of the file, once it is complete."""
        if self._digest is None:
            raise ValueError(f"{self.path}: has no digest before it is complete")
        return self._digest

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Write consecutive indices of dim 0, from `first` on. Each must be written exactly once."""
        dtype, shape = self._entries[name]
        if str(rows.dtype) != f"torch.{dtype}":
            raise ValueError(f"{self.path}: {name}: {rows.dtype} {tuple(rows.shape)} does not fit its entry, {dtype} {shape}")
        self.write_bytes(name, first, as_bytes(rows))

    def write_bytes(self, name: str, first: int, rows: Bytes) -> None:
        """The same of rows as bytes, which must not change before the block ends."""
        dtype, shape = self._entries[name]
        if rows.ndim != len(shape) + 1 or rows.shape[1 if shape else 0 :] != (*shape[1:], dtype.itemsize):
            raise ValueError(f"{self.path}: {name}: {rows.shape[:-1]} does not fit its entry, {dtype} {shape}")
        self._missing[name] -= rows.size
        if self._missing[name] < 0 or (shape and first + len(rows) > shape[0]):
            raise ValueError(f"{self.path}: {name}: more rows written than its shape {shape} has")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = np.ascontiguousarray(rows).reshape(-1).data
        self._pwrite(data, self._data_start + self._offsets[name] + first * row_bytes)

    def close(self) -> None:
        """Finish the file. Raises ValueError, and removes it, when something was not written."""
        missing = [name for name, count in self._missing.items() if count]
        try:
            if missing:
                raise ValueError(f"{self.path}: {missing[0]} was not written completely ({len(missing)} such tensors)")
            size = self.path.stat().st_size
            self._send(size)
        except BaseException:
            self._abandon()
            raise
        self._release()
        digest = self._blake3.hexdigest() if self._end == size else file_blake3(self.path)
        self._digest = FileDigest(size, digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        self._release()
        self.path.unlink(missing_ok=True)

    def _release(self) -> None:
        """Wait until the thread that follows has no more to do with the file."""
        self._follower.wait()
        if not self._shares_follower:
            self._follower.stop()

    def _send(self, end: int) -> None:
        """Have the file sent to the disk up to here. Where the disk is slow, this takes its time."""
        self._follower.do(partial(begin_write_back, self.path, self._sent, end - self._sent))
        self._sent = end

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        if offset == self._end:
            self._follower.do(partial(self._blake3.update, data))
            self._end += len(data)
        view = memoryview(data)
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            error.filename = str(self.path)  # the kernel knows a number only; a person wants the file
            raise
        finally:
            os.close(descriptor)
        if self._end - self._sent >= WRITE_BACK_BYTES:
            self._send(self._end)


def check_slice(where: str, shape: tuple[int, ...], piece: Slice) -> None:
    """Refuse a slice that is not inside a shape. `where` begins the message of the WeightsError."""
    if len(piece) != len(shape) or any(
        not 0 <= start <= stop <= size for (start, stop), size in zip(piece, shape, strict=True)
    ):
        raise WeightsError(f"{where}: has shape {list(shape)}, so there is no slice {format_slice(piece)} of it")


def format_slice(piece: Slice) -> str:
    """A slice as Python writes it, e.g. `[0:4, 8:16]`."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in piece) + "]"


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
