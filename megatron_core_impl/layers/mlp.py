"""The feed-forward layer with SwiGLU (https://arxiv.org/abs/2002.05202), its width cut over the tp group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from megatron_core_impl.layers.parameter import ParameterFactory


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up. Keeps its two inputs and computes silu(gate) again, where autograd would keep it too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, for tensors of one shape."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class MLP(nn.Module):
    """[T, H] → [T, H]. Each tp rank computes its part of the intermediate features for all tokens."""

    def __init__(self, group: Group, parameter: ParameterFactory, prefix: str) -> None:
        super().__init__()
        self.group = group
        self.gate_proj = ColumnParallelLinear(parameter(f"{prefix}.gate_proj.weight"), group)
        self.up_proj = ColumnParallelLinear(parameter(f"{prefix}.up_proj.weight"), group)
        self.down_proj = RowParallelLinear(parameter(f"{prefix}.down_proj.weight"), group)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = column_linear(x, self.gate_proj.weight, self.up_proj.weight, group=self.group)
        return self.down_proj(swiglu(gate, up))  # type: ignore[no-any-return]
