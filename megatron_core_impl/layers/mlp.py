"""The feed-forward layer, gated (https://arxiv.org/abs/2002.05202) or plain, its width cut over the tp group."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.collectives import Group
from megatron_core_impl.config import Activation, ModelConfig
from megatron_core_impl.layers.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from megatron_core_impl.layers.parameter import ParameterFactory
from megatron_core_impl.layers.recompute import produced

_aten = torch.ops.aten

# name -> act(x); and the gradient of x in place of that of act(x)
_ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, lambda grad, x: _aten.silu_backward(grad, x, grad_input=grad)),
    "gelu": (F.gelu, lambda grad, x: _aten.gelu_backward(grad, x, grad_input=grad)),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh", grad_input=grad),
    ),
    "relu": (F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0, grad_input=grad)),
}


class _Gated(torch.autograd.Function):
    """act(gate) · up. Keeps its two inputs and computes act(gate) again, where autograd would keep it too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        act, _ = _ACTIVATIONS[activation]
        product = act(gate)
        # PyTorch 2.11's compiler gives a function no gradient whose result was written in place; that of 2.13 does.
        return product * up if torch.compiler.is_compiling() else product.mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        act, act_backward = _ACTIVATIONS[ctx.activation]
        return act_backward(grad * up, gate), act(gate).mul_(grad), None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up, for tensors of one shape: SwiGLU with silu, GeGLU with gelu, ReGLU with relu."""
    return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return, no-untyped-call]


class MLP(nn.Module):
    """[T, H] → [T, H]. Each tp rank computes its part of the intermediate features for all tokens.

    down(act(gate(x)) · up(x)), or down(act(up(x))) where it is not gated.
    """

    def __init__(
        self, config: ModelConfig, group: Group, parameter: ParameterFactory, prefix: str, *, keeps_product: bool = True
    ) -> None:
        super().__init__()
        self.group = group
        self.keeps_product = keeps_product
        self.activation = config.activation
        # what lies between the products, as an attribute: `parallel.compile` puts its own there
        self.act = partial(gated, activation=config.activation) if config.is_gated else _ACTIVATIONS[config.activation][0]

        def column(name: str) -> ColumnParallelLinear:
            bias = parameter(f"{prefix}.{name}.bias") if config.mlp_bias else None
            return ColumnParallelLinear(parameter(f"{prefix}.{name}.weight"), group, bias)

        self.gate_proj = column("gate_proj") if config.is_gated else None
        self.up_proj = column("up_proj")
        bias = parameter(f"{prefix}.down_proj.bias", sees_all_tokens=False) if config.mlp_bias else None
        self.down_proj = RowParallelLinear(parameter(f"{prefix}.down_proj.weight"), group, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            is_kept = self.keeps_product or self.activation == "relu"  # relu keeps its result for itself, not its input
            with produced(self.act, self.up_proj(x), is_kept=is_kept) as product:
                return self.down_proj(product)  # type: ignore[no-any-return]
        gate, up = column_linear(
            x, self.gate_proj.weight, self.up_proj.weight,
            group=self.group, biases=[self.gate_proj.bias, self.up_proj.bias],
        )  # fmt: skip
        with produced(self.act, gate, up, is_kept=self.keeps_product) as product:
            return self.down_proj(product)  # type: ignore[no-any-return]
