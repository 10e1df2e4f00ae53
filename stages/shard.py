"""Canonical weights, cut for (tp, pp, vpp): one safetensors file per rank, and an index of which slice lies where.

What was written is read back, and every tensor must be its source bit for bit. The vocabulary is cut as training pads it, but
never stored padded: the last tensor-parallel ranks hold fewer rows, or none. Precisions are kept, tensor by tensor, unless
`dtype` asks for one: then every number is rounded to it once.
"""

from megatron_core_impl.config import Layout, ModelConfig
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import ShardSpec
from stages.outcomes import BadInput
from stages.reshaping import reshape


def run(spec: ShardSpec, ctx: Context) -> a.WeightsArtifact:
    """Cut the weights of a spec."""
    weights, folder = ctx.input("weights", a.WeightsArtifact, is_checked_meanwhile=True)
    config = ModelConfig(**weights.model.config_fields())
    try:
        layout = Layout(tp=spec.tp, pp=spec.pp, vpp=spec.vpp)
        layout.check(config)
    except ValueError as error:
        raise BadInput(f"layout: {error}") from error
    model = weights.model.model_copy(update={"dtype": spec.dtype or weights.model.dtype})
    shards = reshape(ctx, folder, config, layout, dtype=model.dtype, rounds=spec.dtype is not None)
    return ctx.artifact(
        a.WeightsArtifact,
        figure=f"tp {spec.tp} · pp {spec.pp}"
        + (f" · vpp {spec.vpp}" if spec.vpp > 1 else "")
        + (f" · {weights.model.dtype} → {spec.dtype}" if shards.is_rounded else ""),
        digests=shards.digests,
        model=model,
        tp=spec.tp,
        pp=spec.pp,
        vpp=spec.vpp,
        trained_steps=weights.trained_steps,
        content=f"{weights.fingerprint} in {spec.dtype}" if shards.is_rounded else weights.fingerprint,
        **shards.facts,
    )


if __name__ == "__main__":
    runtime.main("shard", run, __doc__)
