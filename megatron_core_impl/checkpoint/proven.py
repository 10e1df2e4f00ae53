"""Tensors of a source written into files, one block of rows in memory at a time, with the proof that they are the same bits.

The proof. A block is read from the source as rows of the whole tensor, and its slices go into the files that hold them. Then
the same rows are read back, put together from the pieces that the headers of the files tell of, and compared bit for bit: a
slice that was cut, placed or described wrongly shows. That what was read is what the source holds, its digests say. The digests
of the files are of the bytes that were given to the system: a file that is not what was compared does not have its digest, and
is refused by the next reader.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_core_impl.checkpoint.digests import Follower
from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype, as_bytes
from megatron_core_impl.checkpoint.index import intersect
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter, format_slice
from megatron_core_impl.checkpoint.source import WeightsSource

if TYPE_CHECKING:
    from torch import Tensor
from megatron_core_impl.checkpoint.slicing import Slice, relative, row_blocks, shape_of

KEPT_BYTES = 32 << 20  # the most that glibc takes: below this an allocation is no mapping of its own, and what is free is kept
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>

Progress = Callable[[float, float, str], None]  # done, total, what is being done


class NotEqual(Exception):
    """What was written is not what was read, or cannot be. The message names the tensor."""


class Target(NamedTuple):
    """A file that is being written, and the slices of tensors that it gets, by name."""

    writer: SafetensorsWriter
    pieces: Mapping[str, Slice]


class Advance:
    """Counts the bytes of the source that are done, and tells them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, count: int, text: str) -> None:
        """So many bytes of the source are done."""
        self._done += count
        self._progress(self._done, self._total, text)


def write_tensors(
    targets: Sequence[Target],
    source: WeightsSource,
    dtype: Dtype | None,
    advance: Advance,
    written: WeightsSource,
    follower: Follower,
) -> None:
    """Write tensors into files and prove every bit of them.

    Args:
        targets: files whose tensors are in the same order, so that each is written front to back.
        source: has the tensors by the names that the files give them.
        dtype: what to convert to; default: every tensor keeps its own.
        advance: told every block that is proven.
        written: reads the files that are being written.
        follower: the thread that follows the files; what was written is compared there.

    Raises:
        WeightsError: the source is damaged.
        NotEqual: what was written differs from the source, or a number is beyond float16, where that was asked for.
    """
    _keep_freed_memory()

    def prove(name: str, block: Slice, rows: Bytes) -> None:
        if not same_bytes(rows, written.read_bytes(name, block)):
            raise NotEqual(
                f"{name}: what was written differs from its source in {format_slice(block)}. "
                "The disk or the memory of this machine is not to be trusted"
            )
        advance(prod(shape_of(block)) * source.dtype(name).itemsize, f"writing {name}")

    with nullcontext() if dtype is None else _one_thread():
        for name in dict.fromkeys(name for target in targets for name in target.writer.names):
            holders = [target for target in targets if name in target.pieces]
            wanted = source.dtype(name) if dtype is None else dtype
            if written.dtype(name) != wanted:
                raise NotEqual(f"{name}: is written as {written.dtype(name)}, not as {wanted}")
            for block in row_blocks(_span([target.pieces[name] for target in holders]), source.dtype(name).itemsize):
                rows = _read_within_range(source, name, block, wanted)
                for target in holders:
                    _write_part(target, name, block, rows)
                follower.do(partial(prove, name, block, rows))
            follower.check()
    follower.wait()
    follower.check()


def _span(pieces: Sequence[Slice]) -> Slice:
    """The smallest slice that holds all of some."""
    return tuple((min(start for start, _ in bounds), max(stop for _, stop in bounds)) for bounds in zip(*pieces, strict=True))


def _write_part(target: Target, name: str, block: Slice, rows: Bytes) -> None:
    """Write what a file holds of a block."""
    piece = target.pieces[name]
    common = intersect(piece, block)
    if common is not None:
        part = rows[tuple(slice(*bounds) for bounds in relative(common, block))]
        target.writer.write_bytes(name, common[0][0] - piece[0][0] if piece else 0, part)


def _read_within_range(source: WeightsSource, name: str, block: Slice, dtype: Dtype) -> Bytes:
    rows = read_as(source, name, block, dtype)
    if dtype.name == "float16" != source.dtype(name).name and not np.isfinite(rows.view("<f2")).all():
        raise NotEqual(
            f"{name}: holds numbers that float16 cannot, beyond ±65,504, in {format_slice(block)}. "
            "Ask for bfloat16 or float32: model.dtype where training starts, export.dtype where it ends"
        )
    return rows


def read_as(source: WeightsSource, name: str, block: Slice, dtype: Dtype) -> Bytes:
    """A slice in a precision, each number rounded once, as PyTorch rounds, where that is not the stored one."""
    return source.read_bytes(name, block) if dtype == source.dtype(name) else as_bytes(source.read(name, block, dtype.torch))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have the same dtype, shape and bits. NaN equals itself, 0.0 and -0.0 differ."""
    return a.dtype == b.dtype and same_bytes(as_bytes(a), as_bytes(b))


def same_bytes(a: Bytes, b: Bytes) -> bool:
    """The same of numbers of one precision."""
    return a.shape == b.shape and _memcmp()(a.ctypes.data, b.ctypes.data, a.size) == 0


@cache
def _memcmp() -> Any:
    """C's, which reads each byte once and writes none; it lets go of Python's lock meanwhile."""
    call = ctypes.CDLL(None).memcmp
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return call


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread. On blocks of rows its threads mostly spin until the others are done, which takes three
    times the CPU, and the cores that the digests need.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep the memory of blocks that are done with. Else each is mapped anew, its pages are cleared,
    and that takes as long as reading it. Does nothing where the library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
