"""Weights from any layout to any other, proven to be the same bits.

Shard and merge are this one operation: the canonical form is the sharded form of a single rank. The tensors and how a layout
cuts them come from a family's table (`TensorSpec`); nothing here knows a family.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.digests import Follower
from megatron_core_impl.checkpoint.dtypes import Dtype
from megatron_core_impl.checkpoint.index import Index
from megatron_core_impl.checkpoint.proven import Advance, Progress, Target, write_tensors
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import (
    WeightsReader,
    count_bytes,
    described_tensors,
    open_rank_file,
    open_weights,
    write_index,
)
from megatron_core_impl.checkpoint.slicing import Slice, stored_slices
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import Layout, TensorSpec


def reshard(
    source: WeightsSource,
    folder: Path,
    specs: Sequence[TensorSpec],
    layout: Layout,
    *,
    dtype: Dtype | None = None,
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
        progress: told bytes done and bytes in all.
        extra: further keys of the index beside the layout, such as `step`.

    Raises:
        WeightsError: the source lacks a tensor, holds another shape, or is damaged.
        NotEqual: what lies on the disk now differs from the source, or a number is beyond float16, where that was asked for.
    """
    check_tensors(source, specs)
    advance = Advance(progress, count_bytes(source, (spec.name for spec in specs)))
    with ExitStack() as open_files:
        follower = open_files.enter_context(Follower())
        targets = []
        for rank, pieces in enumerate(plan(specs, layout)):
            entries = [(name, dtype or source.dtype(name), source.shape(name), piece) for name, piece in pieces.items()]
            targets.append(Target(open_files.enter_context(open_rank_file(folder, rank, entries, follower)), pieces))
        written = WeightsReader(folder, Index(described_tensors(folder), {}, {}), {})
        write_tensors(targets, source, dtype, advance, written, follower)
    write_index(folder, {target.writer.path.name: target.writer.digest for target in targets}, layout=asdict(layout), **extra)
    return open_weights(folder)


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
