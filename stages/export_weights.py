"""Canonical weights as the safetensors files of a Hugging Face folder, under the family's own names, fused as it fuses them.

One block of rows is in memory at a time. What was written is read back as convert would read it, tensor by canonical tensor,
and must be its source bit for bit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.reshard import Advance, NotEqual, check_tensors, one_thread, prove_equal, write_piece
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter
from megatron_core_impl.checkpoint.sharded import count_bytes, open_weights
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models import families
from stages.contracts import artifacts as a
from stages.runtime import BadInput, Context, GateFailed

HEADER_BYTES = 160  # at most, of a tensor in the header of its file, besides its name


class Written(NamedTuple):
    """The files of weights in a folder."""

    bytes: int  # of the values
    digests: dict[str, str]  # SHA-256 of the files by name, taken while they were written


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
    advance = Advance(ctx.progress, 2 * sum(sizes.values()))
    shards = plan_shards({name: size + len(name) + HEADER_BYTES for name, size in sizes.items()}, limit)
    digests = {}
    try:
        with one_thread():
            for file_name, inside in shards.items():
                entries = [(name, reader.dtype(name), reader.shape(name)) for name in inside]
                with SafetensorsWriter(folder / file_name, entries, {"format": "pt"}) as writer:
                    for name in writer.names:
                        write_piece(writer, name, reader, whole(reader.shape(name)), None, advance)
                digests[file_name] = writer.digest.sha256
            if len(shards) > 1:
                weight_map = {name: file_name for file_name, inside in shards.items() for name in inside}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            written = Rearranged(open_weights(folder), invert(table))
            prove_equal(canonical, written, [spec.name for spec in specs], None, advance)
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    return Written(sum(sizes.values()), digests)


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
