"""The weights of a training checkpoint, back in canonical form and in the model's precision.

A checkpoint holds fp32 master weights, cut over the ranks of the training, beside the optimizer's moments. The masters are put
together, rounded to the model's precision, written, read back, and compared with the shards they came from.
"""

import torch

from megatron_core_impl.checkpoint.reshard import NotEqual, reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import count_bytes, open_weights
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import MergeSpec
from stages.runtime import BadInput, Context, GateFailed


def run(spec: MergeSpec, ctx: Context) -> a.WeightsArtifact:
    """Merge the checkpoint of a spec."""
    trained, folder = ctx.input("checkpoint", a.CheckpointArtifact)
    dtype: torch.dtype = getattr(torch, trained.model.dtype)
    tensors = families.tensors(ModelConfig(**trained.model.config_fields()))
    try:
        source = open_weights(folder / trained.checkpoint)
        written = reshard(source, ctx.scratch, tensors, Layout(), dtype=dtype, progress=ctx.progress)
    except WeightsError as error:
        raise BadInput(str(error)) from error
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    is_rounded = any(source.dtype(name) != dtype for name in written.names)
    return ctx.artifact(
        a.WeightsArtifact,
        figure="equals the shards, bit for bit" + (f" in {trained.model.dtype}" if is_rounded else ""),
        model=trained.model,
        tp=1,
        pp=1,
        tensors=len(written.names),
        bytes=count_bytes(written, written.names),
        trained_steps=trained.step,
    )


if __name__ == "__main__":
    runtime.main("merge", run, __doc__)
