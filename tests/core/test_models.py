"""The Llama family against transformers: configurations, tensors, logits, gradients."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer

HF: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "head-dim": {"num_key_value_heads": 2, "head_dim": 24},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
}


def random_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(HF | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return model


def ours_of(theirs: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model of the same weights, its configuration read from the file that transformers writes."""
    theirs.config.save_pretrained(tmp_path)
    config = families.config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert families.count_parameters(config) == sum(p.numel() for p in theirs.parameters())
    return tiny.loaded(config, Mesh.single(), theirs.state_dict(), dtype)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_llama(**changes)
    ours = ours_of(theirs, tmp_path)
    tokens, labels = torch.randint(131, (2, 3, 33))
    weights = torch.rand(3, 33)

    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens)[:, :131].view(3, 33, 131), expected, rtol=0, atol=1e-5)

    loss = ours.loss(tokens, labels, weights)
    their_loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none") @ weights.flatten()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    loss.backward()
    their_loss.backward()
    parameters = ours.sharded_parameters()
    for name, parameter in theirs.named_parameters():
        ours_grad = parameters[name].grad
        assert ours_grad is not None
        assert parameter.grad is not None
        error = (ours_grad[: len(parameter)] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_position_ids_are_honoured(tmp_path: Path) -> None:
    theirs = random_llama(num_key_value_heads=2)
    ours = ours_of(theirs, tmp_path)
    tokens = torch.randint(131, (2, 9))
    positions = torch.stack((torch.arange(9) + 5, torch.arange(9) * 3))
    expected = theirs(tokens, position_ids=positions).logits
    torch.testing.assert_close(ours(tokens, positions)[:, :131].view(2, 9, 131), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(ours(tokens)[:, :131].view(2, 9, 131), expected, atol=1e-2)


def test_bf16_rounds_about_where_transformers_does(tmp_path: Path) -> None:
    theirs = random_llama(num_key_value_heads=2)
    exact = theirs(torch.arange(32).view(2, 16)).logits
    theirs = theirs.to(torch.bfloat16)
    ours = ours_of(theirs, tmp_path, torch.bfloat16)
    tokens = torch.arange(32).view(2, 16)
    our_error = (ours(tokens)[:, :131].view(2, 16, 131) - exact).abs().mean()
    their_error = (theirs(tokens).logits - exact).abs().mean()
    assert our_error < 1.2 * their_error


def test_hidden_states_can_be_observed(tmp_path: Path) -> None:
    theirs = random_llama()
    ours = ours_of(theirs, tmp_path)
    tokens = torch.randint(131, (1, 8))
    seen: list[torch.Tensor] = []
    for layer in ours.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    ours(tokens)
    expected = theirs(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[0], expected[1][0], rtol=0, atol=1e-5)
    assert [tuple(x.shape) for x in seen] == [(8, 64)] * 3


def test_tensors_are_those_of_transformers() -> None:
    for changes in VARIANTS.values():
        theirs = random_llama(**changes)
        config = families.config_from_hf(HF | changes)
        assert {spec.name: spec.shape for spec in families.tensors(config)} == {
            name: tuple(p.shape) for name, p in theirs.named_parameters()
        }
        single = Transformer(config, Mesh.single(), dtype=torch.float32)
        assert list(single.sharded_parameters()) == [spec.name for spec in families.tensors(config)]


def test_old_and_new_spellings_of_a_configuration_mean_the_same() -> None:
    old = families.config_from_hf(HF | {"rope_theta": 5e5, "rope_scaling": None})
    new = families.config_from_hf(HF | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert old == new
    assert old.rope_theta == 5e5
    bare = {name: value for name, value in HF.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    filled = families.config_from_hf(bare)
    theirs = LlamaConfig(**bare)
    assert (filled.num_key_value_heads, filled.head_dim, filled.rms_norm_eps, filled.rope_theta) == (
        theirs.num_key_value_heads, theirs.head_dim, theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"^config\.json: model_type='gpt2' is not supported\. Supported: llama$"),
        ({"model_type": None}, r"^config\.json: model_type=None is not supported"),
        ({"hidden_act": "gelu"}, r"^config\.json: hidden_act='gelu' is not supported; only hidden_act='silu' is$"),
        ({"attention_bias": True}, r"attention_bias=True is not supported"),
        ({"mlp_bias": True}, r"mlp_bias=True is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, r"rope_scaling=.*linear.* is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling=.*llama3.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_parameters=.*yarn.* is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor.* is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is not supported\. Start from the model's unquantized"),
        ({"intermediate_size": None}, r"^config\.json: intermediate_size is missing$"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, r"num_attention_heads=7 does not divide hidden_size=64"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=8"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        families.config_from_hf(HF | changes)


def test_weights_of_another_shape_are_refused() -> None:
    weights = tiny.random_weights(tiny.GROUPED)
    weights["lm_head.weight"] = torch.ones(200, 24)
    message = r"^lm_head\.weight has shape \(200, 24\) in the checkpoint, but \(131, 24\) in the model's configuration$"
    with pytest.raises(ValueError, match=message):
        tiny.loaded(tiny.GROUPED, Mesh.single(), weights)


def test_describing_a_model_does_not_import_torch() -> None:
    code = "import sys, megatron_core_impl.models.families, megatron_core_impl.optim; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
