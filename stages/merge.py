"""The weights of a training checkpoint, back in canonical form, in the model's precision or the one asked for.

A checkpoint holds fp32 master weights, cut over the ranks of the training, beside the optimizer's moments. The masters are put
together, rounded once, written, read back, and compared with the shards they came from.
"""

from megatron_core_impl.config import Layout, ModelConfig
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import MergeSpec
from stages.input_check import importing
from stages.reshaping import reshape


def run(spec: MergeSpec, ctx: Context) -> a.WeightsArtifact:
    """Merge the checkpoint of a spec."""
    trained, folder = ctx.input("checkpoint", a.CheckpointArtifact, is_checked_meanwhile=True)
    with importing():  # PyTorch, which rounds, while the input is hashed
        import torch  # noqa: F401

    model = trained.model.model_copy(update={"dtype": spec.dtype or trained.model.dtype})
    config = ModelConfig(**trained.model.config_fields())
    merged = reshape(ctx, folder / trained.checkpoint, config, Layout(), dtype=model.dtype, rounds=True)
    return ctx.artifact(
        a.WeightsArtifact,
        figure="equals the shards, bit for bit" + (f" in {model.dtype}" if merged.is_rounded else ""),
        digests=merged.digests,
        model=model,
        tp=1,
        pp=1,
        trained_steps=trained.step,
        **merged.facts,
    )


if __name__ == "__main__":
    runtime.main("merge", run, __doc__)
