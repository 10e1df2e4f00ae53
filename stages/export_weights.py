"""Canonical weights as the safetensors files of a Hugging Face folder, under the family's own names, fused as it fuses them.

One block of rows is in memory at a time. What was written is read back and must be its source bit for bit; what was fused is
read back once more, as convert would read it, tensor by canonical tensor.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from megatron_core_impl.checkpoint.digests import Follower
from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.proven import Advance, NotEqual, Target, write_tensors
from megatron_core_impl.checkpoint.reshard import check_tensors
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter
from megatron_core_impl.checkpoint.sharded import count_bytes, open_weights
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import ModelConfig, StackedTensor, TensorSpec
from megatron_core_impl.models import families
from megatron_core_impl.parity.tensors import prove
from stages.context import Context
from stages.contracts import artifacts as a
from stages.outcomes import BadInput, GateFailed

HEADER_BYTES = 160  # at most, of a tensor in the header of its file, besides its name


class Written(NamedTuple):
    """The files of weights in a folder."""

    bytes: int  # of the values
    digests: dict[str, str]  # BLAKE3 of the files by name, taken while they were written


def write_weights(source: Path, model: a.ModelFacts, folder: Path, ctx: Context, *, limit: int) -> Written:
    """Write all tensors as model.safetensors, or as several files and their index, and prove that they are the source's.

    Args:
        source: a folder of canonical weights.
        limit: bytes of a file, its header included, unless one tensor has more.

    Raises:
        BadInput: the weights are not those of the model, or damaged.
        GateFailed: what was written is not what was read.
    """
    try:
        canonical, config = open_weights(source), ModelConfig(**model.config_fields())
        specs = families.tensors(config)
        check_tensors(canonical, specs)
        table = families.family_of(config).hf_tensors(config)
        reader = Rearranged(canonical, table)
        sizes = {name: count_bytes(reader, [name]) for name in reader.names}
    except ValueError as error:
        raise BadInput(f"inputs.weights: {error}") from error
    advance = Advance(ctx.progress, sum(sizes.values()))
    shards = plan_shards({name: size + len(name) + HEADER_BYTES for name, size in sizes.items()}, limit)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    try:
        with ExitStack() as open_files:
            follower = open_files.enter_context(Follower())
            targets = []
            for file_name, inside in shards.items():
                entries = [(name, reader.dtype(name), reader.shape(name)) for name in inside]
                writer = SafetensorsWriter(folder / file_name, entries, {"format": "pt"}, follower)
                targets.append(Target(open_files.enter_context(writer), {name: whole(reader.shape(name)) for name in inside}))
            write_tensors(targets, reader, None, advance, open_weights(folder), follower)
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    _prove_fused(canonical, Rearranged(open_weights(folder), invert(table)), specs, table)
    return Written(sum(sizes.values()), {target.writer.path.name: target.writer.digest.blake3 for target in targets})


def _prove_fused(
    canonical: WeightsSource, again: WeightsSource, specs: Sequence[TensorSpec], table: Iterable[StackedTensor]
) -> None:
    """Read back as convert would what is more than renamed: fused, cut or put in another order."""
    fused = {
        rows.tensor
        for stacked in table
        for rows in stacked.parts
        if len(stacked.parts) > 1 or rows.transposed or rows.stop - rows.start < canonical.shape(rows.tensor)[0]
    }
    proof = prove(again, canonical, [spec for spec in specs if spec.name in fused])
    if proof.differing:
        raise GateFailed(f"{proof.differing[0]}: what was written, read as convert reads it, differs from its source")


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Which tensors go into which file: in their order, at most `limit` bytes a file, under Hugging Face's file names."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": inside for n, inside in enumerate(shards, start=1)}
