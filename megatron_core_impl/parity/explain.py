"""What may have happened to a module that computes something else: a look at its weights, and at how its error grows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import TensorSpec
from megatron_core_impl.parity.figures import LOGITS, Difference

EPSILON = "rms_norm_eps (layer_norm_epsilon)"  # as config.json calls it, by the kind of norm
NORMS = {  # of the input of a module: the first of these that there is
    "self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm", "mlp_layernorm", "input_layernorm"),
}  # fmt: skip
BLOCK = 1 << 24  # numbers that are looked at in double precision at a time


def explain(first: Difference, ours: WeightsSource, source: WeightsSource, specs: Sequence[TensorSpec], name: str) -> str:
    """The likely cause of a first difference: from the weights where these differ, else from how the error grows.

    Args:
        ours, source: the stored weights of both sides, under canonical names.
        specs: the tensors of the model.
        name: what messages call the other side.
    """
    if weights := explain_tensors(_behind(first.module, specs), ours, source, specs, name):
        return weights
    if first.output == "attention output":
        if first.start > 0.1 * first.relative:
            return f"Its weights agree, and position 0 differs too: compare {EPSILON} and how heads share keys and values."
        if first.early < 0.25 * first.late:
            return (
                "Its weights agree, and the error grows along the sequence from 0 at position 0: "
                "this is what a wrong rope_theta or rope scaling looks like."
            )
        return (
            "Its weights agree, and only position 0 is right: this is what a wrong RoPE convention (interleaved for "
            "half-split), a wrong rope scaling, a wrong rope_theta in a short window, or a wrong scale of the scores, looks "
            "like."
        )
    if first.output == "mlp output":
        return f"Its weights agree: compare the activation function (hidden_act, or activation) and {EPSILON}."
    if first.output == "final norm":
        return f"Its weight agrees: compare {EPSILON}."
    return "Its weights agree, so it is the computation that differs."


def module_of(tensor: str) -> str:
    """The first point of the model whose output depends on a tensor."""
    module = tensor.rpartition(".")[0]
    parent, _, last = module.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        return parent
    for point, norms in NORMS.items():
        if last in norms:
            return f"{parent}.{point}"
    return module


def explain_tensors(
    names: Sequence[str], ours: WeightsSource, source: WeightsSource, specs: Sequence[TensorSpec], name: str
) -> str | None:
    """What differs between both sides in some tensors, in a sentence. None where nothing does."""
    by_name = {spec.name: spec for spec in specs}
    pairs = {}  # ours and the source's, without rows for added tokens
    for each in names:
        rows = min(ours.shape(each)[0], source.shape(each)[0])
        piece = ((0, rows), *((0, size) for size in ours.shape(each)[1:]))
        pairs[each] = ours.read(each, piece), source.read(each, piece, ours.dtype(each).torch)
    differing = sorted(each for each, pair in pairs.items() if not torch.equal(*pair))
    if not differing:
        return None
    if all(_gate_for_up(each) in pairs and torch.equal(pairs[each][0], pairs[_gate_for_up(each)][1]) for each in differing):
        return "gate_proj and up_proj are swapped."
    listed = " and ".join(dict.fromkeys(each.split(".")[-2] for each in differing))
    if all(_is_shifted(*pairs[each]) for each in differing):
        return f"Rows of {listed} are those of {name} shifted by one."
    if all(_is_interleaved(*pairs[each], by_name[each]) for each in differing):
        return (
            f"Rows of {listed} are in the interleaved RoPE convention (Meta's and Megatron-LM's files), "
            "which must be undone at import."
        )
    orders = [_order_of_heads(*pairs[each], by_name[each]) for each in differing]
    if all(orders) and orders[0]:
        return f"Heads of {listed} are those of {name} in another order: {', '.join(map(str, orders[0]))}."
    if all(_is_transposed(*pairs[each]) for each in differing):
        return f"{listed} is that of {name} transposed."
    if all(_has_same_rows(*pairs[each]) for each in differing):
        return f"Rows of {listed} are those of {name} in another order."
    return f"Weights of {listed} are not those of {name}."


def _behind(module: str, specs: Sequence[TensorSpec]) -> list[str]:
    """The tensors that a module's output depends on, given that everything before it agrees."""
    names = [spec.name for spec in specs]
    if module == LOGITS and "lm_head.weight" not in names:  # tied
        return [name for name in names if name.startswith("model.embed_tokens.")]
    parent, _, last = module.rpartition(".")
    norm = next((n for n in NORMS.get(last, ()) if any(name.startswith(f"{parent}.{n}.") for name in names)), None)
    prefixes = (f"{module}.", *([f"{parent}.{norm}."] if norm else []))
    return [name for name in names if name.startswith(prefixes)]


def _gate_for_up(name: str) -> str:
    """The name of the up projection for that of the gate, and the reverse."""
    words: Mapping[str, str] = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return ".".join(words.get(part, part) for part in name.split("."))


def _is_shifted(mine: Tensor, other: Tensor) -> bool:
    """Whether rows moved by one place, up or down."""
    return torch.equal(mine[1:], other[:-1]) or torch.equal(mine[:-1], other[1:])


def _is_interleaved(mine: Tensor, other: Tensor, spec: TensorSpec) -> bool:
    """Whether rows 0, 1, 2, … of each head became 0, d/2, 1, … (half-split to interleaved), or the reverse."""
    if spec.heads is None or spec.tp_dim != 0 or mine.shape != other.shape:
        return False
    half = spec.heads.head_dim // 2
    a, b = (tensor.view(-1, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape) for tensor in (mine, other))
    return torch.equal(a, other) or torch.equal(b, mine)


def _order_of_heads(mine: Tensor, other: Tensor, spec: TensorSpec) -> list[int] | None:
    """Which of the other's heads each of mine is, where they are the same heads in another order."""
    if spec.heads is None or mine.shape != other.shape:
        return None
    a, b = (torch.split(tensor.movedim(spec.tp_dim or 0, 0), spec.heads.head_dim) for tensor in (mine, other))
    order = [next((k for k, theirs in enumerate(b) if torch.equal(head, theirs)), -1) for head in a]
    return order if sorted(order) == list(range(len(b))) else None


def _is_transposed(mine: Tensor, other: Tensor) -> bool:
    return mine.ndim == 2 and mine.shape == other.t().shape and torch.equal(mine, other.t())


def _has_same_rows(mine: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same rows in some order, told by the rows' sums and sums of squares."""
    if mine.shape != other.shape:
        return False
    rows = max(1, BLOCK // max(1, mine[0].numel()))
    for power in (1, 2):
        a, b = (
            torch.cat([some.double().pow(power).reshape(len(some), -1).sum(1) for some in torch.split(part, rows)])
            .sort()
            .values
            for part in (mine, other)
        )
        if not torch.allclose(a, b, rtol=1e-9, atol=1e-12):
            return False
    return True
