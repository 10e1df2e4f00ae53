"""Weights from any layout to any other, one block of rows in memory at a time, with the proof that they are the same bits.

Shard and merge are this one operation: the canonical form is the sharded form of a single rank. The tensors and how a layout
cuts them come from a family's table (`TensorSpec`); nothing here knows a family.

The proof. What was written is read back, tensor by tensor as a whole, put together from the pieces that the headers of the
files tell of, and compared bit for bit with the source, read a second time. Writing goes the other way, rank by rank in slices:
a slice that was cut, placed or described wrongly shows, and so does a file that the disk did not keep. The digests in the index
are of the bytes that were given to the system, taken in a second thread meanwhile: a file that is not what was compared does
not have its digest, and is refused by the next reader.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter, WeightsError, format_slice, row_blocks
from megatron_core_impl.checkpoint.sharded import (
    WeightsReader,
    WeightsSource,
    count_bytes,
    open_rank_file,
    open_weights,
    write_index,
)
from megatron_core_impl.checkpoint.slicing import Slice, stored_slices, whole
from megatron_core_impl.config import Layout, TensorSpec

MOST_THREADS = 4  # that read back: more wait for the disk

Progress = Callable[[float, float, str], None]  # done, total, what is being done


class NotEqual(Exception):
    """What was written is not what was read, or cannot be. The message names the tensor."""


def reshard(
    source: WeightsSource,
    folder: Path,
    specs: Sequence[TensorSpec],
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total, text: None,
    **extra: Any,
) -> WeightsReader:
    """Write the tensors of a model in the form of a layout, and prove every bit of it by reading it back.

    Args:
        source: weights in any form; tensors that are not in `specs`, such as optimizer moments, are left out.
        folder: an empty folder: one file per rank and index.json are made in it.
        specs: the tensors of the model.
        layout: who holds what. Weights to start from have dp=1; with more, rows are cut over dp as training's state is.
        dtype: what to convert to; default: every tensor keeps its own.
        progress: told bytes done and bytes in all, writing and reading back.
        extra: further keys of the index beside the layout, such as `step`.

    Raises:
        WeightsError: the source lacks a tensor, holds another shape, or is damaged.
        NotEqual: what lies on the disk now differs from the source, or a number is beyond float16, where that was asked for.
    """
    check_tensors(source, specs)
    advance = Advance(progress, 2 * count_bytes(source, (spec.name for spec in specs)))
    digests = {}
    with one_thread():
        for rank, pieces in enumerate(plan(specs, layout)):
            entries = [(name, dtype or source.dtype(name), source.shape(name), piece) for name, piece in pieces.items()]
            with open_rank_file(folder, rank, entries) as writer:
                for name in writer.names:
                    write_piece(writer, name, source, pieces[name], dtype, advance)
            digests[writer.path.name] = writer.digest
        write_index(folder, digests, layout=asdict(layout), **extra)
        written = open_weights(folder)
        prove_equal(source, written, [spec.name for spec in specs], dtype, advance)
    return written


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread. On blocks of rows its threads mostly spin until the others are done, which takes three
    times the CPU, and the cores that the digests need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Advance:
    """Counts the bytes of the source that are done, and tells them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = Lock()

    def __call__(self, rows: Tensor, stored: torch.dtype, text: str) -> None:
        """Some rows, stored in the source as `stored`, are done. May be called by several threads."""
        with self._lock:
            self._done += rows.numel() * stored.itemsize
            self._progress(self._done, self._total, text)


def write_piece(
    writer: SafetensorsWriter, name: str, source: WeightsSource, piece: Slice, dtype: torch.dtype | None, advance: Advance
) -> None:
    """Write a slice of a tensor as the tensor of that name in a file, block by block.

    Raises:
        WeightsError: the source is damaged.
        NotEqual: a number is beyond float16, where that was asked for.
    """
    stored = source.dtype(name)
    for block in row_blocks(piece, stored.itemsize):
        rows = source.read(name, block, dtype)
        if rows.dtype == torch.float16 != stored and not torch.isfinite(rows).all():
            raise NotEqual(
                f"{name}: holds numbers that float16 cannot, beyond ±65,504, in {format_slice(block)}. "
                "Ask for bfloat16 or float32: model.dtype where training starts, export.dtype where it ends"
            )
        writer.write_rows(name, block[0][0] - piece[0][0] if piece else 0, rows)
        advance(rows, stored, f"writing {name}")


def plan(specs: Sequence[TensorSpec], layout: Layout) -> list[dict[str, Slice]]:
    """What each rank's file holds, rank by rank: name -> slice.

    Raises:
        ValueError: the layout cannot cut a tensor.
    """
    num_layers = 1 + max(spec.layer for spec in specs)
    return [stored_slices(specs, num_layers, layout, rank) for rank in range(layout.world_size)]


def check_tensors(source: WeightsSource, specs: Iterable[TensorSpec]) -> None:
    """Refuse weights that lack a tensor of the model or hold it in another shape.

    Raises:
        WeightsError: naming the tensor.
    """
    names = set(source.names)
    missing = [spec.name for spec in specs if spec.name not in names]
    if missing:
        raise WeightsError(f"{source.folder}: lacks {list_names(missing)}")
    for spec in specs:
        if source.shape(spec.name) != spec.shape:
            raise WeightsError(
                f"{source.folder}: {spec.name} has shape {list(source.shape(spec.name))}, the model needs {list(spec.shape)}"
            )


def list_names(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def prove_equal(
    source: WeightsSource, written: WeightsSource, names: Sequence[str], dtype: torch.dtype | None, advance: Advance
) -> None:  # fmt: skip
    """Read tensors back whole, block by block, and compare them with their source, converted to `dtype` if that is given.

    Several threads share the tensors among them.

    Raises:
        WeightsError: a file is damaged.
        NotEqual: they differ in a bit.
    """

    def prove(name: str) -> None:
        stored = source.dtype(name)
        for block in row_blocks(whole(source.shape(name)), stored.itemsize):
            expected, found = source.read(name, block, dtype), written.read(name, block)
            if not same_bits(expected, found):
                raise NotEqual(
                    f"{name}: what was written differs from its source in {format_slice(block)}. "
                    "The disk or the memory of this machine is not to be trusted"
                )
            advance(expected, stored, f"reading back {name}")

    pool = ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        for _ in pool.map(prove, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have the same dtype, shape and bits. NaN equals itself, 0.0 and -0.0 differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (tensor.detach().reshape(-1).view(torch.uint8).numpy() for tensor in (a, b))
    words = x.size // 8 * 8  # compared eight bytes at a time: as bytes it takes as long as a SHA-256
    return np.array_equal(x[:words].view(np.uint64), y[:words].view(np.uint64)) and np.array_equal(x[words:], y[words:])
