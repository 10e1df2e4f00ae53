"""The layers one by one: gradients by finite differences, and equality with torch and transformers.

`sharded` makes a parameter, or a tp rank's part of it, from a whole tensor.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import GlooPool
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_core_impl.config import Activation, Layout, ModelConfig, RopeScaling
from megatron_core_impl.layers import norm
from megatron_core_impl.layers.embedding import VocabParallelEmbedding
from megatron_core_impl.layers.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from megatron_core_impl.layers.mlp import MLP, gated
from megatron_core_impl.layers.norm import LayerNorm, RMSNorm
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.layers.rope import frequencies, rotate, rotation
from megatron_core_impl.mesh import init_mesh

ACTIVATIONS: dict[Activation, nn.Module] = {
    "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU(),
}  # fmt: skip


ROWS = 8  # of a rank's part of the embedding


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()
    )


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> ShardedParameter:
    return ShardedParameter(random(*shape, dtype=dtype).detach())


def model_config(**changes: Any) -> ModelConfig:
    numbers: dict[str, Any] = {
        "family": "llama", "vocab_size": 131, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig(**(numbers | changes))


class RecordingSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        self.grads.append(grad)

    def add_product(self, grad_output: Tensor, x: Tensor) -> None:
        self.grads.append(grad_output.t() @ x)

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        self.grads.append(torch.zeros(ROWS, grad.shape[1], dtype=grad.dtype).index_add_(0, rows, grad))


def test_gradients_of_the_functions_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "CACHED", 9)  # two tokens at a time, and one
    turn = rotation(torch.arange(3), frequencies(model_config(head_dim=4), torch.float64), torch.float64)
    assert gradcheck(lambda x: rotate(x, turn), random(2, 3, 2, 4))
    for activation in ACTIVATIONS:
        assert gradcheck(lambda gate, up, a=activation: gated(gate, up, a), (random(3, 4), random(3, 4) + 1))
    rms_norm = RMSNorm(parameter(4), 1e-5)
    assert gradcheck(lambda x, w: rms_norm(x), (random(3, 4), rms_norm.weight))
    two = (parameter(4, 3), parameter(2, 3), parameter(4), parameter(2))
    assert gradcheck(
        lambda x, v, w, b, c: column_linear(x, v, w, group=None, biases=[b, c]), (random(5, 3), *two), check_batched_grad=False
    )
    row = RowParallelLinear(parameter(4, 3), None, parameter(4))
    assert gradcheck(lambda x, w, b: row(x), (random(5, 3), row.weight, row.bias))


def test_biases_are_added_where_there_are_any() -> None:
    x, weights = random(5, 3), (parameter(4, 3), parameter(2, 3))
    bias = parameter(2)
    first, second = column_linear(x, *weights, group=None, biases=[None, bias])
    assert torch.equal(first, F.linear(x, weights[0]))
    assert torch.equal(second, F.linear(x, weights[1], bias))
    assert torch.equal(RowParallelLinear(weights[1], None, bias)(x), second)


def test_a_sink_takes_the_gradients_of_weights_and_autograd_those_of_biases() -> None:
    x = random(5, 3)
    column, row = (
        ColumnParallelLinear(parameter(4, 3), None, parameter(4)),
        RowParallelLinear(parameter(2, 4), None, parameter(2)),
    )
    row(column(x)).square().sum().backward()
    sinks = RecordingSink(), RecordingSink()
    expected = [layer.weight.grad for layer in (column, row)], [layer.bias.grad for layer in (column, row)], x.grad
    x.grad = None
    for layer, sink in zip((column, row), sinks, strict=True):
        layer.weight.sink, layer.weight.grad, layer.bias.grad = sink, None, None
    torch.utils.checkpoint.checkpoint(lambda x: row(column(x)), x, use_reentrant=False).square().sum().backward()
    weight_grads, bias_grads, grad_x = expected
    for layer, sink, weight_grad, bias_grad in zip((column, row), sinks, weight_grads, bias_grads, strict=True):
        (grad,) = sink.grads
        assert torch.equal(grad, weight_grad)
        assert layer.weight.grad is None
        assert torch.equal(layer.bias.grad, bias_grad)
    assert torch.equal(x.grad, grad_x)


def linear_rank(is_row: bool, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of a tp rank. Tokens are cut over dim 0; the layer's features as its kind says."""
    mesh = init_mesh(Layout(tp=2), "cpu")
    rank, group = mesh.tp_rank, mesh.tp_group

    def own(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(2, dim)[rank].contiguous()

    x = own(x, 1 if is_row else 0).detach().requires_grad_()
    sharded = ShardedParameter(own(weight.detach(), 1 if is_row else 0))
    sharded_bias = ShardedParameter(bias.detach().clone() if is_row else own(bias.detach(), 0))
    layer = (RowParallelLinear if is_row else ColumnParallelLinear)(sharded, group, sharded_bias)
    y = layer(x)
    y.backward(own(grad, 0 if is_row else 1))
    return [tensor.detach() for tensor in (y, x.grad, sharded.grad, sharded_bias.grad)]


@pytest.mark.parametrize("is_row", [False, True], ids=["column", "row"])
def test_a_linear_layer_over_two_ranks_is_the_whole_one(pool: GlooPool, is_row: bool) -> None:
    x, weight, bias, grad = random(6, 8), random(4, 8), random(4), random(6, 4).detach()
    first, second = pool.run(linear_rank, 2, is_row, x, weight, bias, grad)
    y = F.linear(x, weight, bias)
    y.backward(grad)
    cut, features = (0, 1) if is_row else (1, 0)  # the dims in which outputs and inputs are cut
    torch.testing.assert_close(torch.cat([first[0], second[0]], cut), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([first[1], second[1]], features), x.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([first[2], second[2]], features), weight.grad, rtol=1e-13, atol=1e-13)
    whole_bias = first[3] + second[3] if is_row else torch.cat([first[3], second[3]])  # a row's is summed once per step
    torch.testing.assert_close(whole_bias, bias.grad, rtol=1e-13, atol=1e-13)


def embedding_rank(tokens: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient by autograd, gradient by the sink."""
    mesh = init_mesh(Layout(tp=2), "cpu")
    part = ShardedParameter(weight.detach().chunk(2)[mesh.tp_rank].clone())
    layer, sink = VocabParallelEmbedding(part, mesh.tp_group), RecordingSink()
    y = layer(tokens)
    y.backward(grad.chunk(2)[mesh.tp_rank])
    part.sink = sink
    layer(tokens).backward(grad.chunk(2)[mesh.tp_rank])
    assert part.grad is not None
    return [y.detach(), part.grad, *sink.grads]


def test_an_embedding_over_two_ranks_is_the_whole_one(pool: GlooPool) -> None:
    tokens, weight, grad = torch.tensor([0, 15, 7, 8, 7, 3]), random(2 * ROWS, 4), random(6, 4).detach()
    ranks = pool.run(embedding_rank, 2, tokens, weight, grad)
    y = F.embedding(tokens, weight)
    y.backward(grad)
    for number, want in enumerate((y, weight.grad, weight.grad)):
        torch.testing.assert_close(torch.cat([rank[number] for rank in ranks]), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight, bias = random(5, 12, dtype=dtype), parameter(12, dtype=dtype), parameter(12, dtype=dtype)
    expected = nn.LayerNorm(12, eps=1e-3, dtype=dtype)
    expected.weight.data, expected.bias.data = weight.data, bias.data
    assert torch.equal(LayerNorm(weight, bias, 1e-3)(x), expected(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_where_transformers_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "CACHED", 200)
    x, weight = random(7, 96, dtype=dtype), parameter(96, dtype=dtype)
    theirs = LlamaRMSNorm(96, eps=1e-3)
    theirs.weight.data = weight.data
    assert torch.equal(RMSNorm(weight, 1e-3)(x), theirs(x))


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_act_of_gate_times_up_or_act_of_up(activation: Activation, is_gated: bool, mlp_bias: bool) -> None:
    made: dict[str, ShardedParameter] = {}

    def make(name: str, *, sees_all_tokens: bool = True) -> ShardedParameter:
        of_down, is_bias = "down" in name, name.endswith("bias")
        made[name] = parameter(12 if of_down else 20) if is_bias else parameter(12, 20) if of_down else parameter(20, 12)
        made[name].data *= 1 + len(made)  # those of one shape would be alike
        assert sees_all_tokens is not (of_down and is_bias)
        return made[name]

    config = model_config(activation=activation, is_gated=is_gated, mlp_bias=mlp_bias)
    x = random(5, 12)
    y = MLP(config, None, make, "m")(x)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, made[f"m.{name}.weight"], made.get(f"m.{name}.bias"))

    act, up = ACTIVATIONS[activation], linear("up_proj", x)
    expected = linear("down_proj", act(linear("gate_proj", x)) * up if is_gated else act(up))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    names = ["gate_proj", "up_proj", "down_proj"] if is_gated else ["up_proj", "down_proj"]
    assert sorted(made) == sorted(f"m.{n}.{kind}" for n in names for kind in (["weight", "bias"] if mlp_bias else ["weight"]))
    inputs = [x, *made.values()]
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_rotation_pairs_the_halves_of_a_head() -> None:
    x = random(1, 3, 1, 4)
    turned = rotate(
        x,
        rotation(
            torch.tensor([0, 1, 7]), frequencies(model_config(head_dim=4, rope_theta=100.0), torch.float64), torch.float64
        ),
    )
    for row, position in enumerate((0, 1, 7)):
        for pair, speed in enumerate((1.0, 0.1)):
            a, b = x[0, row, 0, pair].item(), x[0, row, 0, pair + 2].item()
            cos, sin = math.cos(position * speed), math.sin(position * speed)
            got = (turned[0, row, 0, pair].item(), turned[0, row, 0, pair + 2].item())
            assert got == pytest.approx((a * cos - b * sin, b * cos + a * sin), rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (RopeScaling(kind="linear", factor=8.0), {"rope_type": "linear", "factor": 8.0}),
        (
            RopeScaling(
                kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
            ),
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_scaled_frequencies_are_those_of_transformers_bit_by_bit(scaling: RopeScaling, theirs: dict[str, Any]) -> None:
    config = model_config(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    hf = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=theirs | {"rope_theta": 500000.0})
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](hf, "cpu")
    assert factor == 1.0
    assert torch.equal(frequencies(config, torch.float32), expected)
    plain = frequencies(model_config(head_dim=128, rope_theta=500000.0), torch.float32)
    assert (plain / expected).unique().numel() > (2 if scaling.kind == "llama3" else 0), "all three parts are met"
