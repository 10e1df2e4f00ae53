"""What goes wrong when weights are moved about, in every family: each fault is found in its layer, and told by its name.

Faults of weights are made in canonical tensors, after which both the proof of tensors and the comparison of what is computed
must find them, each by itself. Faults of the configuration leave the weights as they are.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_models import InMemory, described, ours_of, random_model
from parity_runs import comparisons
from torch import Tensor
from transformers import PreTrainedModel

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.layers import attention
from megatron_core_impl.layers.rope import Rotation, frequencies, rotate
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parity.explain import explain, explain_tensors, module_of
from megatron_core_impl.parity.figures import LOGITS, layer_of
from megatron_core_impl.parity.tensors import prove

Tensors = dict[str, Tensor]
FLOOR = 1e-5
FAMILIES = ["llama", "mistral", "falcon-7b", "falcon-40b", "qwen2"]


def canonical(model: PreTrainedModel) -> Tensors:
    ours = ours_of(model)
    return {name: p.detach()[: p.spec.shape[0]].clone() for name, p in ours.sharded_parameters().items()}


def build(config: ModelConfig, tensors: Tensors) -> Transformer:
    model = parallelize(config, Mesh.single(), dtype=torch.float32)
    load_weights(model, InMemory(tensors))
    return model.eval()


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def swap_heads(tensors: Tensors, config: ModelConfig) -> None:
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1.self_attn.q_proj"):
            tensor[: 2 * config.head_dim] = tensor[: 2 * config.head_dim].roll(config.head_dim, 0)


def swap_heads_of_output(tensors: Tensors, config: ModelConfig) -> None:
    tensor = tensors["model.layers.1.self_attn.o_proj.weight"]
    tensor[:, : 2 * config.head_dim] = tensor[:, : 2 * config.head_dim].roll(config.head_dim, 1)


def transpose(tensors: Tensors, config: ModelConfig) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


def interleave(tensors: Tensors, config: ModelConfig) -> None:
    """Half-split to interleaved: row j·d/2 + i of each head becomes row 2i + j."""
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.view(-1, 2, config.head_dim // 2, *tensor.shape[1:])
            tensors[name] = halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def swap_gate_and_up(tensors: Tensors, config: ModelConfig) -> None:
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def shift_vocabulary(tensors: Tensors, config: ModelConfig) -> None:
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = tensors[name].roll(1, 0)


def shift_head(tensors: Tensors, config: ModelConfig) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(-1, 0)


IN_ORDER = "are those of transformers in another order: 1, 0"
WEIGHTS: list[tuple[Callable[[Tensors, ModelConfig], None], str, str]] = [
    (swap_heads, "model.layers.1.self_attn", f"Heads of q_proj {IN_ORDER}"),
    (swap_heads_of_output, "model.layers.1.self_attn", f"Heads of o_proj {IN_ORDER}"),
    (transpose, "model.layers.1.self_attn", "o_proj is that of transformers transposed."),
    (interleave, "model.layers.0.self_attn", "Rows of k_proj and q_proj are in the interleaved RoPE convention"),
    (swap_gate_and_up, "model.layers.1.mlp", "gate_proj and up_proj are swapped."),
    (shift_vocabulary, "model.embed_tokens", "Rows of embed_tokens are those of transformers shifted by one."),
    (shift_head, LOGITS, "Rows of lm_head are those of transformers shifted by one."),
]


@pytest.mark.parametrize(("fault", "module", "cause"), WEIGHTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("kind", FAMILIES)
def test_wrong_weights(kind: str, fault: Callable[[Tensors, ModelConfig], None], module: str, cause: str) -> None:
    theirs = random_model(kind)
    config, source = described(theirs), canonical(theirs)
    if fault is swap_gate_and_up and not config.is_gated:
        pytest.skip("has no gate")
    if fault is shift_head and config.tie_word_embeddings:
        pytest.skip("its output layer is its embedding")
    damaged = {name: tensor.clone() for name, tensor in source.items()}
    fault(damaged, config)
    specs, ours, reference = families.tensors(config), InMemory(damaged), InMemory(source)

    # by what is computed
    found = comparisons(theirs, build(config, damaged))
    assert found.keys() >= {"data", "padding", "long positions", "last ids of the vocabulary"}
    for comparison in found.values():
        first = comparison.first_difference(FLOOR)
        assert first is not None, comparison.name
        assert first.module == module, comparison.name
        assert comparison.agreement_before(first) < 2e-6
        assert comparison.worst.relative > 1e-2  # ten times the gate
        assert explain(first, ours, reference, specs, "transformers").startswith(cause)

    # by the tensors, whatever is computed
    proof = prove(ours, reference, specs)
    assert {module_of(name) for name in proof.differing} >= {module.removesuffix("lm_head") or "lm_head"}
    assert layer_of(proof.differing[0]) == layer_of(module)
    names = [name for name in proof.differing if module_of(name) == module_of(proof.differing[0])]
    assert str(explain_tensors(names, ours, reference, specs, "transformers")).startswith(cause)


def test_other_faults_of_weights() -> None:
    theirs = random_model("llama")
    config, source = described(theirs), canonical(theirs)
    specs = families.tensors(config)

    def told(name: str, change: Callable[[Tensor], Tensor]) -> str | None:
        damaged = InMemory({**source, name: change(source[name])})
        return explain_tensors([name], damaged, InMemory(source), specs, "transformers")

    mlp, q = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert told(mlp, lambda w: w) is None
    assert told(mlp, lambda w: w.flip(0)) == "Rows of up_proj are those of transformers in another order."
    assert told(mlp, lambda w: w * 1.01) == "Weights of up_proj are not those of transformers."
    assert told("model.norm.weight", lambda w: w * 1.01) == "Weights of norm are not those of transformers."
    assert told(q, lambda w: w.flip(0)) == "Rows of q_proj are those of transformers in another order."


# ── Configuration and computation ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", FAMILIES)
def test_forgotten_theta(kind: str) -> None:
    """The base of a model that has one of its own. Seen wherever tokens are apart, and best at long positions."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    theirs = random_model(kind, **rope)
    ours = build(replace(described(theirs), rope_theta=1e4), canonical(theirs))
    check_rope(theirs, ours, "wrong rope_theta")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_dropped_scaling(kind: str, scaling: dict[str, Any]) -> None:
    theirs = random_model(kind, rope_parameters=scaling)
    config = described(theirs)
    assert config.rope_scaling is not None
    ours = build(replace(config, rope_scaling=None), canonical(theirs))
    check_rope(theirs, ours, "rope scaling")


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_convention_in_the_computation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right weights, turned in pairs (0, 1), (2, 3), … instead of (0, d/2), (1, d/2 + 1), …"""

    def interleaved(x: Tensor, by: Rotation) -> Tensor:
        def halves(values: Tensor) -> Tensor:
            return torch.cat((values[..., ::2], values[..., 1::2]), -1)

        return torch.stack(rotate(halves(x), by).chunk(2, -1), -1).flatten(-2)

    theirs = random_model(kind)
    monkeypatch.setattr(attention, "rotate", interleaved)
    check_rope(theirs, ours_of(theirs), "wrong RoPE convention")


def check_rope(theirs: PreTrainedModel, ours: Transformer, cause: str) -> None:
    found = comparisons(theirs, ours)
    source = InMemory(canonical(theirs))
    for comparison in found.values():
        first = comparison.first_difference(FLOOR)
        assert first is not None, comparison.name
        assert first.module == "model.layers.0.self_attn", comparison.name
        assert first.output == "attention output"
        assert comparison.worst.relative > 1e-2, comparison.name
    first = found["data"].first_difference(FLOOR)
    assert first is not None
    assert first.start < 1e-6 < first.late
    assert cause in explain(first, source, source, families.tensors(ours.config), "transformers")


def test_wrong_window_is_seen_beyond_it() -> None:
    """A window that is one key too long changes nothing up to its end: the data of a model that reads little would pass."""
    theirs = random_model("mistral", sliding_window=48)
    found = comparisons(theirs, build(replace(described(theirs), sliding_window=49), canonical(theirs)))
    for name in ("data", "padding"):
        assert found[name].first_difference(FLOOR) is None
    first = found["beyond the sliding window"].first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.0.self_attn"


def test_angles_in_half_precision_are_seen_at_long_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions above 256 do not exist in bf16. Data that end before never show it."""
    theirs = random_model("llama", max_position_embeddings=4096)
    ours = ours_of(theirs)
    ours.speeds = frequencies(ours.config, torch.float32)
    whole = torch.Tensor.to

    def to(self: Tensor, *arguments: Any, **names: Any) -> Tensor:
        rounded = whole(self, torch.bfloat16) if self.dtype == torch.int64 and arguments == (torch.float32,) else self
        return whole(rounded, *arguments, **names)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = comparisons(theirs, ours)
    assert found["data"].first_difference(FLOOR) is None
    first = found["long positions"].first_difference(FLOOR)
    assert first is not None
    assert first.module == "model.layers.0.self_attn"


def test_documents_that_see_each_other_are_seen_under_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text is one document a row. Where rows are packed, attention must end between them."""
    theirs = random_model("llama")
    monkeypatch.setattr(attention.Sequences, "document_lengths", property(lambda _: None, lambda *_: None), raising=False)
    found = comparisons(theirs, ours_of(theirs))
    assert found["data"].first_difference(FLOOR) is None
    assert found["padding"].first_difference(FLOOR) is not None


def test_wrong_epsilon_and_activation() -> None:
    theirs = random_model("llama")
    config, source = described(theirs), InMemory(canonical(theirs))
    for changes, module, cause in (
        ({"norm_eps": 1e-2}, "model.layers.0.self_attn", "compare rms_norm_eps"),
        ({"activation": "gelu"}, "model.layers.0.mlp", "hidden_act"),
    ):
        first = comparisons(theirs, build(replace(config, **changes), source.tensors))["data"].first_difference(FLOOR)  # type: ignore[arg-type]
        assert first is not None
        assert first.module == module
        assert cause in explain(first, source, source, families.tensors(config), "transformers")
