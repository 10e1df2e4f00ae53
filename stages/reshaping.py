"""What shard and merge share: weights of one layout under another, proven equal, and what the artifact tells of them."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_core_impl.checkpoint.dtypes import dtype_of
from megatron_core_impl.checkpoint.proven import NotEqual
from megatron_core_impl.checkpoint.reshard import reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import WeightsReader, count_bytes, open_weights
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families
from megatron_core_impl.parity.tensors import proven
from stages.context import Context
from stages.outcomes import BadInput, GateFailed
from stages.stored_dtypes import other_dtypes


class Reshaped(NamedTuple):
    """Weights that were written into a stage's scratch folder."""

    is_rounded: bool  # some tensors were stored in another precision
    facts: dict[str, Any]  # of a WeightsArtifact: tensors, bytes, other_dtypes; and its metrics
    digests: dict[str, str]  # BLAKE3 of the files, taken while they were written


def reshape(ctx: Context, folder: Path, config: ModelConfig, layout: Layout, *, dtype: str, rounds: bool) -> Reshaped:
    """Write the weights in a folder under another layout, into the scratch folder, and prove that they are the same.

    Args:
        dtype: the model's precision, and with `rounds` that of every tensor from now on.

    Raises:
        BadInput: the weights are not those of the model, or damaged.
        GateFailed: what was written is not what was read.
    """
    wanted = dtype_of(dtype) if rounds else None
    specs = families.tensors(config)
    try:
        source = open_weights(folder)
        written = reshard(source, ctx.scratch, specs, layout, dtype=wanted, progress=ctx.progress)
    except WeightsError as error:
        raise BadInput(str(error)) from error
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    names = written.names
    return Reshaped(
        is_rounded=any(source.dtype(name) != written.dtype(name) for name in names),
        facts={
            "tensors": len(names),
            "bytes": count_bytes(written, names),
            "other_dtypes": other_dtypes(written, names, dtype),
            "metrics": {"tensors": proven(written, source, specs).report()},
        },
        digests=digests_of(written),
    )


def digests_of(written: WeightsReader) -> dict[str, str]:
    """BLAKE3 of the files of a folder by name, as its index gives them."""
    return {name: digest.blake3 for name, digest in written.index.files.items()}
