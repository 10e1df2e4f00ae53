"""Weights from any layout to any other, one block of rows in memory at a time, with the proof that they are the same bits.

Shard and merge are this one operation: the canonical form is the sharded form of a single rank. The tensors and how a layout
cuts them come from a family's table (`TensorSpec`); nothing here knows a family.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import WeightsError, format_slice, row_blocks
from megatron_core_impl.checkpoint.sharded import (
    WeightsReader,
    WeightsSource,
    count_bytes,
    open_rank_file,
    open_weights,
    write_index,
)
from megatron_core_impl.checkpoint.slicing import Slice, rank_slices, replica
from megatron_core_impl.config import Layout, TensorSpec

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
) -> WeightsReader:
    """Write the tensors of a model in the form of a layout, and prove every bit of it by reading it back.

    Args:
        source: weights in any form; tensors that are not in `specs`, such as optimizer moments, are left out.
        folder: an empty folder: one file per (pp, tp) rank and index.json are made in it.
        specs: the tensors of the model.
        layout: tp and pp; dp does not cut weights.
        dtype: what to convert to; default: every tensor keeps its own.
        progress: told bytes done and bytes in all, writing and reading back.

    Raises:
        WeightsError: the source lacks a tensor, holds another shape, or is damaged.
        NotEqual: what lies on the disk now differs from the source, or a number is beyond float16, where that was asked for.
    """
    check_tensors(source, specs)
    total = 2 * count_bytes(source, (spec.name for spec in specs))
    done = 0

    def advance(rows: Tensor, stored: torch.dtype, text: str) -> None:
        nonlocal done
        done += rows.numel() * stored.itemsize
        progress(done, total, text)

    for rank, pieces in enumerate(plan(specs, layout)):
        entries = [(name, dtype or source.dtype(name), source.shape(name), piece) for name, piece in pieces.items()]
        with open_rank_file(folder, rank, entries) as writer:
            for name, piece in pieces.items():
                stored = source.dtype(name)
                for block in row_blocks(piece, stored.itemsize):
                    rows = source.read(name, block, dtype)
                    if rows.dtype == torch.float16 != stored and not torch.isfinite(rows).all():
                        raise NotEqual(
                            f"{name}: holds numbers that float16 cannot, beyond ±65,504, in {format_slice(block)}. "
                            "Start from the model in bfloat16 or float32"
                        )
                    writer.write_rows(name, block[0][0] - piece[0][0] if piece else 0, rows)
                    advance(rows, stored, f"writing {name}")
    write_index(folder, layout={"tp": layout.tp, "pp": layout.pp, "dp": 1})
    written = open_weights(folder)
    for spec in specs:
        _prove_equal(source, written, spec.name, dtype, advance)
    return written


def plan(specs: Sequence[TensorSpec], layout: Layout) -> list[dict[str, Slice]]:
    """What each rank's file holds, rank by rank: name -> slice. What several ranks hold is stored by the first of them alone.

    Raises:
        ValueError: the layout cannot cut a tensor.
    """
    num_layers = 1 + max(spec.layer for spec in specs)
    by_name = {spec.name: spec for spec in specs}
    weights = Layout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp)
    ranks = []
    for rank in range(weights.world_size):
        pp_rank, _, tp_rank = weights.coordinates(rank)
        slices = rank_slices(specs, num_layers, weights, rank)
        ranks.append({n: piece for n, piece in slices.items() if replica(by_name[n], weights, pp_rank, tp_rank) == 0})
    return ranks


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


def _prove_equal(
    source: WeightsSource,
    written: WeightsSource,
    name: str,
    dtype: torch.dtype | None,
    advance: Callable[[Tensor, torch.dtype, str], None],
) -> None:
    stored = source.dtype(name)
    for block in row_blocks(tuple((0, size) for size in source.shape(name)), stored.itemsize):
        expected, found = source.read(name, block, dtype), written.read(name, block)
        if not same_bits(expected, found):
            raise NotEqual(
                f"{name}: what was written differs from its source in {format_slice(block)}. "
                "The disk or the memory of this machine is not to be trusted"
            )
        advance(expected, stored, f"reading back {name}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have the same dtype, shape and bits. NaN equals itself, 0.0 and -0.0 differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
