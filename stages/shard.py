"""Canonical weights, cut for (tp, pp, vpp): one safetensors file per rank, and an index of which slice lies where.

What was written is read back, and every tensor must be its source bit for bit. The vocabulary is cut as training pads it, but
never stored padded: the last tensor-parallel ranks hold fewer rows, or none.
"""

from megatron_core_impl.checkpoint.reshard import NotEqual, reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import count_bytes, open_weights
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import ShardSpec
from stages.runtime import BadInput, Context, GateFailed


def run(spec: ShardSpec, ctx: Context) -> a.WeightsArtifact:
    """Cut the weights of a spec."""
    weights, folder = ctx.input("weights", a.WeightsArtifact)
    config = ModelConfig(**weights.model.config_fields())
    try:
        layout = Layout(tp=spec.tp, pp=spec.pp, vpp=spec.vpp)
        layout.check(config)
    except ValueError as error:
        raise BadInput(f"layout: {error}") from error
    try:
        written = reshard(open_weights(folder), ctx.scratch, families.tensors(config), layout, progress=ctx.progress)
    except WeightsError as error:
        raise BadInput(str(error)) from error
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    return ctx.artifact(
        a.WeightsArtifact,
        figure=f"tp {spec.tp} · pp {spec.pp}" + (f" · vpp {spec.vpp}" if spec.vpp > 1 else ""),
        model=weights.model,
        tp=spec.tp,
        pp=spec.pp,
        vpp=spec.vpp,
        tensors=len(written.names),
        bytes=count_bytes(written, written.names),
        trained_steps=weights.trained_steps,
    )


if __name__ == "__main__":
    runtime.main("shard", run, __doc__)
