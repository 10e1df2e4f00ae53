"""Every kind of model against transformers: logits, loss, gradients, windows, padding, positions far out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.nn.functional as F
from hf_models import KINDS, VOCAB, logits_of, ours_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_core_impl.checkpoint.foreign import assemble, invert
from megatron_core_impl.config import ModelConfig, RopeScaling
from megatron_core_impl.layers.rope import frequencies
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm"
ONE_PER_FAMILY = ["llama", "mistral", "qwen2", "falcon-7b", "falcon-40b"]


def tokens_of(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ── Logits, loss, gradients ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str) -> None:
    """Over 33 tokens: well beyond the windows of 5."""
    theirs = hf_models.random_model(kind)
    ours, tokens = ours_of(theirs), tokens_of(3, 33)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ONE_PER_FAMILY)
def test_loss_and_gradients_are_those_of_transformers(kind: str) -> None:
    theirs = hf_models.random_model(kind)
    ours = ours_of(theirs)
    tokens, labels, weights = tokens_of(2, 17), tokens_of(2, 17, seed=6), torch.rand(2, 17)
    loss = ours.loss(tokens, labels, weights)
    their_logits = theirs(tokens).logits.flatten(0, 1)
    their_loss = F.cross_entropy(their_logits, labels.flatten(), reduction="none") @ weights.flatten()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    torch.autograd.backward(loss)
    torch.autograd.backward(their_loss)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    canonical = {stacked.name: stacked for stacked in invert(families.family_of(ours.config).hf_tensors(ours.config))}
    parameters = ours.sharded_parameters()
    assert parameters.keys() == canonical.keys()
    for name, parameter in parameters.items():
        want = assemble(canonical[name], gradients.__getitem__)
        assert parameter.grad is not None, name
        # The bias of the keys moves all scores of a query alike: its gradient is zero but for rounding.
        scale = want.norm() if not name.endswith("k_proj.bias") else parameter.grad.new_tensor(1.0)
        assert (parameter.grad[: len(want)] - want).norm() / scale < 1e-5, name


@pytest.mark.parametrize("kind", ONE_PER_FAMILY)
def test_bf16_rounds_about_where_transformers_does(kind: str) -> None:
    """No further from the exact logits than transformers is: far inside the gate of verify."""
    theirs, tokens = hf_models.random_model(kind), tokens_of(2, 33)
    with torch.no_grad():
        exact = theirs(tokens).logits
        theirs = theirs.to(torch.bfloat16)
        our_error = (logits_of(ours_of(theirs, torch.bfloat16), tokens) - exact).abs().mean()
        their_error = (theirs(tokens).logits - exact).abs().mean()
    assert our_error < 1.2 * their_error


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["llama2_gqa", "falcon7"])
def test_golden_models(name: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(GOLDEN / name / "hf", dtype=torch.float32)
    tokens = tokens_of(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours_of(theirs), tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


# ── Windows, padding, positions ───────────────────────────────────────────────────────────────────────────────────────


def test_a_window_hides_what_is_behind_it() -> None:
    """One layer, window 5: position t sees t-4 … t and nothing before."""
    theirs = hf_models.random_model("mistral", num_hidden_layers=1)
    ours, tokens = ours_of(theirs), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    with torch.no_grad():
        moved = (logits_of(ours, tokens) - logits_of(ours, changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [3 <= position < 8 for position in range(12)]


@pytest.mark.parametrize("kind", ONE_PER_FAMILY)
def test_padding_on_the_right_changes_no_real_position(kind: str) -> None:
    """transformers hides it by a mask; ours needs none, as it lies behind all that is real."""
    theirs, tokens = hf_models.random_model(kind), tokens_of(3, 20)
    mask = torch.arange(20) < torch.tensor([[20], [13], [4]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long()).logits
        got = logits_of(ours_of(theirs), torch.where(mask, tokens, 0))
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["codellama", "llama-linear", "llama3", "mistral", "qwen2", "falcon-7b"])
def test_positions_far_out(kind: str) -> None:
    """Of every sequence its own, some of them thousands of times the context."""
    theirs, tokens = hf_models.random_model(kind), tokens_of(2, 9)
    ours = ours_of(theirs)
    positions = torch.stack((torch.arange(9) + 100_000, torch.arange(9) * 3))
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions).logits
        torch.testing.assert_close(logits_of(ours, tokens, positions), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(logits_of(ours, tokens)[1], expected[1], atol=1e-2)


def test_golden_angles() -> None:
    """G9 of the reference: head_dim 8, base 1e4; a factor of 2 makes position 6 what 3 was."""
    config = hf_models.described(hf_models.random_model("llama", num_hidden_layers=1, head_dim=8))
    plain = frequencies(config, torch.float64)
    assert plain.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert (3 * plain).tolist() == pytest.approx([3, 0.3, 0.03, 0.003])
    halved = frequencies(replace(config, rope_scaling=RopeScaling(kind="linear", factor=2.0)), torch.float64)
    torch.testing.assert_close(6 * halved, 3 * plain)


# ── Knobs that no family of transformers has ──────────────────────────────────────────────────────────────────────────


def formula(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [S, V] of one sequence, written down plainly."""

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].t() + (0 if bias is None else bias)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
        return scaled + weights.get(f"{name}.bias", torch.zeros(()))

    def turn(x: Tensor) -> Tensor:  # [S, D], feature i with i + D/2
        half = config.head_dim // 2
        speed = config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        z = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * torch.arange(len(x))[:, None] * speed)
        return torch.cat([z.real, z.imag], -1)

    def attention(x: Tensor, prefix: str) -> Tensor:
        q, k, v = (torch.split(linear(x, f"{prefix}.{name}_proj"), config.head_dim, -1) for name in "qkv")
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        per_kv = len(q) // len(k)
        heads = [
            torch.where(mask, turn(q[n]) @ turn(k[n // per_kv]).t() / config.head_dim**0.5, -torch.inf).softmax(-1)
            @ v[n // per_kv]
            for n in range(len(q))
        ]
        return linear(torch.cat(heads, -1), f"{prefix}.o_proj")

    def mlp(x: Tensor, prefix: str) -> Tensor:
        acts: dict[str, Callable[[Tensor], Tensor]] = {
            "silu": lambda y: y * y.sigmoid(),
            "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
            "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
            "relu": lambda y: y.clamp_min(0),
        }
        act = acts[config.activation]
        up = linear(x, f"{prefix}.up_proj")
        inner = act(linear(x, f"{prefix}.gate_proj")) * up if config.is_gated else act(up)
        return linear(inner, f"{prefix}.down_proj")

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = norm(x, f"{prefix}.input_layernorm")
        attended = attention(normed, f"{prefix}.self_attn")
        if config.is_parallel:
            second = normed if config.has_shared_norm else norm(x, f"{prefix}.mlp_layernorm")
            x = x + attended + mlp(second, f"{prefix}.mlp")
        else:
            x = x + attended
            x = x + mlp(norm(x, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.t()


KNOBS: dict[str, dict[str, Any]] = {
    "geglu-layernorm-tied": {"activation": "gelu", "norm": "layernorm", "tie_word_embeddings": True},
    "reglu-mlp-bias": {"activation": "relu", "mlp_bias": True},
    "plain-gelu-o-bias": {"activation": "gelu_tanh", "is_gated": False, "o_bias": True},
    "plain-silu-parallel-rmsnorm": {"is_gated": False, "is_parallel": True, "has_shared_norm": True, "qkv_bias": True},
    "swiglu-parallel-two-norms": {"is_parallel": True, "norm": "layernorm", "norm_eps": 1e-2},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_knobs_are_their_formula(knobs: dict[str, Any]) -> None:
    config = ModelConfig(
        family="llama", vocab_size=29, hidden_size=20, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=32, **knobs,
    )  # fmt: skip
    ours = Transformer(config, Mesh.single(), dtype=torch.float64).eval()
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in ours.sharded_parameters().items():
            rows = parameter.spec.shape[0]
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(weights))) * 0.4)
            weights[name] = parameter.detach()[:rows]
    assert list(weights) == [spec.name for spec in families.tensors(config)]
    tokens = torch.randint(29, (2, 11))
    with torch.no_grad():
        for got, sequence in zip(logits_of(ours, tokens), tokens, strict=True):
            torch.testing.assert_close(got, formula(config, weights, sequence), rtol=1e-12, atol=1e-12)
