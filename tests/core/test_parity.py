"""parity.compare: the reference against copies of itself with one known fault each."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from megatron_core_impl.parity import LOGITS, Batch, Comparison, Difference, Side, compare, explain, points

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 3, 4, 2, 16, 64, 96
FLOOR = 1e-5


def make_model(*, rope_theta: float = 10000.0, layers: int = LAYERS, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    return LlamaForCausalLM(config).eval()


def side(model: LlamaForCausalLM, name: str = "ours") -> Side:
    return Side(name, model, lambda tokens: model(tokens).logits, model.config.num_hidden_layers)


def make_batches(count: int = 2, size: int = 2, length: int = 32) -> list[Batch]:
    samples = torch.randint(VOCAB, (count, size, length + 1), generator=torch.Generator().manual_seed(5))
    return [(sample[:, :-1], sample[:, 1:]) for sample in samples]


@pytest.fixture(scope="module")
def reference() -> Side:
    return side(make_model(), "transformers")


def test_equal_models_differ_in_nothing(reference: Side) -> None:
    result = compare(side(make_model()), reference, make_batches())
    assert (result.mean_error, result.max_error, result.loss_difference, result.argmax_agreement) == (0, 0, 0, 1)
    assert [difference.module for difference in result.differences] == [*points(LAYERS), LOGITS]
    assert all(difference.relative == 0 for difference in result.differences)
    assert result.first_difference(0.0) is None
    assert result.not_finite is None
    assert result.tokens == 2 * 2 * 32


def test_figures_are_those_of_the_definition(reference: Side) -> None:
    """Errors, losses and agreement against a plain computation over everything at once."""
    other = make_model(seed=1)
    batches = make_batches()
    result = compare(side(other), reference, batches)
    mine, theirs, labels = [], [], []
    with torch.no_grad():
        for tokens, wanted in batches:
            mine.append(other(tokens).logits.flatten(0, 1))
            theirs.append(reference.logits(tokens).flatten(0, 1))
            labels.append(wanted.flatten())
    a, b, y = torch.cat(mine), torch.cat(theirs), torch.cat(labels)
    assert result.mean_error == pytest.approx((a - b).abs().mean().item(), rel=1e-5)
    assert result.max_error == pytest.approx((a - b).abs().max().item())
    assert result.loss_ours == pytest.approx(F.cross_entropy(a, y).item(), rel=1e-5)
    assert result.loss_reference == pytest.approx(F.cross_entropy(b, y).item(), rel=1e-5)
    assert result.argmax_agreement == pytest.approx((a.argmax(1) == b.argmax(1)).float().mean().item())
    assert compare(side(other), reference, batches[::-1]).max_error == result.max_error
    logits = result.differences[-1]
    assert logits.relative == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-5)
    a, b = a.view(4, 32, -1), b.view(4, 32, -1)
    for name, part in (("start", slice(0, 1)), ("early", slice(1, 5)), ("late", slice(16, 32))):
        expected = ((a - b)[:, part].norm() / b[:, part].norm()).item()
        assert getattr(logits, name) == pytest.approx(expected, rel=1e-5)


def test_rows_are_compared_in_pieces_of_any_length(reference: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(side(make_model(seed=1)), reference, make_batches())
    monkeypatch.setattr("megatron_core_impl.parity.ROWS", 23)
    pieces = compare(side(make_model(seed=1)), reference, make_batches())
    assert pieces.mean_error == pytest.approx(whole.mean_error, rel=1e-6)
    assert pieces.loss_ours == pytest.approx(whole.loss_ours, rel=1e-6)
    assert pieces.differences[1].late == pytest.approx(whole.differences[1].late, rel=1e-6)


def test_another_implementation_agrees_to_rounding(reference: Side) -> None:
    model = make_model()
    model.config._attn_implementation = "eager"
    result = compare(side(model), reference, make_batches())
    assert 0 < result.mean_error < 1e-6
    assert result.first_difference(FLOOR) is None


# ── Faults: each is found where it was made, and told by its name ─────────────────────────────────────────────────────


def interleave(weight: Tensor) -> Tensor:
    """Half-split to interleaved: row j·d/2 + i of each head becomes row 2i + j."""
    return weight.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(weight.shape)


def swap_heads(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.copy_(torch.cat([weight[HEAD_DIM : 2 * HEAD_DIM], weight[:HEAD_DIM], weight[2 * HEAD_DIM :]]))


def swap_last_heads(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.copy_(torch.cat([weight[: 2 * HEAD_DIM], weight[3 * HEAD_DIM :], weight[2 * HEAD_DIM : 3 * HEAD_DIM]]))


def interleave_all(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.copy_(interleave(linear.weight))


def swap_gate_and_up(model: LlamaForCausalLM) -> None:
    mlp = model.model.layers[1].mlp
    gate = mlp.gate_proj.weight.clone()
    mlp.gate_proj.weight.copy_(mlp.up_proj.weight)
    mlp.up_proj.weight.copy_(gate)


def transpose_output(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.copy_(weight.t().clone())


def shift_embedding(model: LlamaForCausalLM) -> None:
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))


def shift_head(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.copy_(model.lm_head.weight.roll(-1, 0))


def scale_norm(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.mul_(1.01)


@pytest.mark.parametrize(
    ("fault", "module", "cause"),
    [
        (swap_heads, "model.layers.1.self_attn", "Rows of q_proj are those of transformers in another order: heads"),
        (swap_last_heads, "model.layers.1.self_attn", "Rows of q_proj are those of transformers in another order: heads"),
        (interleave_all, "model.layers.0.self_attn", "Rows of k_proj and q_proj are in the interleaved RoPE convention"),
        (swap_gate_and_up, "model.layers.1.mlp", "gate_proj and up_proj are swapped."),
        (transpose_output, "model.layers.2.self_attn", "Weights of o_proj are not those of transformers."),
        (shift_embedding, "model.embed_tokens", "Rows of embed_tokens are those of transformers shifted by one."),
        (shift_head, LOGITS, "Rows of lm_head are those of transformers shifted by one."),
        (scale_norm, "model.norm", "Weights of norm are not those of transformers."),
    ],
)
def test_wrong_weights(reference: Side, fault: Callable[[LlamaForCausalLM], None], module: str, cause: str) -> None:
    model = make_model()
    with torch.no_grad():
        fault(model)
    ours = side(model)
    result = compare(ours, reference, make_batches())
    first = result.first_difference(FLOOR)
    assert first is not None
    assert first.module == module
    assert result.agreement_before(first) == 0
    assert explain(first, ours, reference).startswith(cause)


def test_wrong_theta_grows_along_the_sequence(reference: Side) -> None:
    ours = side(make_model(rope_theta=1e6))
    first = compare(ours, reference, make_batches()).first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.0.self_attn"
    assert (first.layer, first.output) == (0, "attention output")
    assert first.start == 0
    assert first.early < first.late
    assert "wrong rope_theta or rope scaling" in explain(first, ours, reference)


def test_wrong_convention_in_the_computation(reference: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right weights, turned in pairs (0, 1), (2, 3), … instead of (0, d/2), (1, d/2 + 1), …"""

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (part[..., : HEAD_DIM // 2].repeat_interleave(2, -1).unsqueeze(1) for part in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin

        return turn(q), turn(k)

    model = make_model()

    def logits(tokens: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
            return model(tokens).logits

    ours = Side("ours", model, logits, LAYERS)
    first = compare(ours, reference, make_batches()).first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.0.self_attn"
    assert "wrong RoPE convention" in explain(first, ours, reference)


def test_wrong_epsilon_is_there_from_position_0(reference: Side) -> None:
    model = make_model()
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.variance_epsilon = 1e-4
    ours = side(model)
    first = compare(ours, reference, make_batches()).first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.0.self_attn"
    assert "compare rms_norm_eps" in explain(first, ours, reference)


def test_wrong_activation(reference: Side) -> None:
    model = make_model()
    model.model.layers[2].mlp.act_fn = nn.GELU()
    ours = side(model)
    first = compare(ours, reference, make_batches()).first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.2.mlp"
    assert "hidden_act" in explain(first, ours, reference)


def test_rounding_alone_is_no_first_difference() -> None:
    """bfloat16 against its eager twin: errors are everywhere, none jumps above the floor of that precision."""
    model, twin = make_model().bfloat16(), make_model().bfloat16()
    twin.config._attn_implementation = "eager"
    result = compare(side(twin), side(model, "transformers"), make_batches())
    assert result.mean_error > 0
    assert result.first_difference(3e-2) is None


@pytest.mark.parametrize(
    ("errors", "first"),
    [
        ((0.0, 2e-6, 8e-6, 3e-5, 9e-5), None),  # grows with depth: rounding
        ((0.0, 2e-6, 8e-6, 1e-3, 5e-2), 3),
        ((0.0, 2e-6, 8e-6, 5e-5, 2e-3), 4),
        ((0.0, 9e-6, 8e-6, 9e-6, 9e-6), None),
        ((1e-2, 1e-2, 1e-2, 1e-2, 1e-2), 0),
    ],
)
def test_first_difference_is_a_jump(errors: tuple[float, ...], first: int | None) -> None:
    differences = tuple(Difference(str(i), error, error, error, 0.0, 0.0, 0.0) for i, error in enumerate(errors))
    comparison = Comparison(1, 0.0, 0.0, 0.0, 0.0, 1.0, differences, None)
    found = comparison.first_difference(FLOOR)
    assert found == (None if first is None else differences[first])
    if found is not None:
        assert comparison.agreement_before(found) == max(errors[:first], default=0.0)


def test_a_module_may_write_into_its_input() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    class Model(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(VOCAB, VOCAB), "norm": norm})

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model["norm"](self.model["embed_tokens"](tokens))

    class Copying(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    in_place, copying = Model(Norm()), Model(Copying())
    for ours, theirs in ((in_place, copying), (copying, in_place)):
        result = compare(Side("ours", ours, ours, 0), Side("transformers", theirs, theirs, 0), make_batches())
        assert [difference.relative for difference in result.differences] == [0, 0, 0]


# ── What cannot be compared ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_names_side_and_module(reference: Side, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    result = compare(side(model), reference, make_batches())
    assert result.not_finite == "ours: model.layers.1.mlp"
    assert math.isinf(result.mean_error)
    both = compare(side(model), side(copy.deepcopy(model), "transformers"), make_batches())
    assert both.not_finite == "transformers: model.layers.1.mlp"


def test_refuses_what_does_not_fit(reference: Side) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers=2 of ours is not the 3 of transformers"):
        compare(side(make_model(layers=2)), reference, make_batches())
    with pytest.raises(ValueError, match="no batch"):
        compare(side(make_model()), reference, [])
    model = make_model()
    short = Side("ours", model, lambda tokens: model(tokens).logits[..., :-1], LAYERS)
    with pytest.raises(ValueError, match=rf"lm_head: ours computes \(64, {VOCAB - 1}\), transformers computes \(64, {VOCAB}\)"):
        compare(short, reference, make_batches())


def test_hooks_are_removed(reference: Side) -> None:
    model = make_model()
    compare(side(model), reference, make_batches(count=1))
    assert not any(module._forward_hooks for module in itertools.chain(model.modules(), reference.module.modules()))


def test_keeps_one_batch_at_a_time(reference: Side) -> None:
    """Batches are taken one by one, each only when the one before is done."""
    taken: list[int] = []
    done: list[int] = []
    model = make_model()

    def logits(tokens: Tensor) -> Tensor:
        done.append(len(done))
        return model(tokens).logits

    def stream() -> Comparison:
        def batches():  # type: ignore[no-untyped-def]
            for i, batch in enumerate(make_batches(count=3)):
                assert len(done) == i
                taken.append(i)
                yield batch

        return compare(Side("ours", model, logits, LAYERS), reference, batches())

    stream()
    assert taken == [0, 1, 2]
