"""Hugging Face weights to canonical ones: the same numbers, bit for bit, each accounted for, and rows for added tokens.

Every tensor that config.json implies must be there with the right shape, and nothing else may be. A family's table tells what
the tensors are called there and how they are fused. Precisions are kept, tensor by tensor; one block of rows is in memory at a
time. What was written is read back and compared with the source.
"""

from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import ConvertSpec
from stages.conversion import convert


def run(spec: ConvertSpec, ctx: Context) -> a.WeightsArtifact:
    """Convert the model of a spec."""
    model, folder = ctx.input("model", a.ModelArtifact, is_checked_meanwhile=True)
    return convert(spec, ctx, model, folder)


if __name__ == "__main__":
    runtime.main("convert", run, __doc__)
