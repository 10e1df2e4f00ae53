"""Linear layers cut over the tp group (https://arxiv.org/abs/1909.08053, with the sequence parallelism of 2205.05198).

Letters: T tokens of this rank, S = T·tp tokens of the micro batch, I and O features in and out of the whole layer.
Weights are stored as [O, I], like those of `torch.nn.Linear`; none of these layers has a bias.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.parameter import ShardedParameter


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        gathered = collectives.all_gather(x, group).wait()  # [S, I]
        return tuple(F.linear(gathered, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathering = collectives.all_gather(x, ctx.group)  # under the products of the input's gradient
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        gathered = gathering.wait()
        reducing = collectives.reduce_scatter(grad_x, ctx.group)  # under the products of the weights' gradients
        grad_weights = [grad.t() @ gathered for grad in grads]
        return reducing.wait(), None, *grad_weights


def column_linear(x: Tensor, *weights: Tensor, group: Group) -> tuple[Tensor, ...]:
    """`x Wᵀ` for several weights whose rows are cut over tp; the input is gathered once for all of them.

    Args:
        x: [T, I], this rank's tokens.
        weights: [O/tp, I] each.

    Returns:
        [S, O/tp] for each weight.

    forward   all-gather x            → [S, I];  y = x Wᵀ                   [S, O/tp]
    backward  all-gather x again (only this rank's [T, I] is kept);  dW = dyᵀ x   [O/tp, I], complete
              dx = Σ dy W  [S, I], partial → reduce-scatter → [T, I]
    """
    return _ColumnLinear.apply(x, group, *weights)  # type: ignore[no-any-return, no-untyped-call]


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are cut over tp: [T, I] → [S, O/tp]. See `column_linear`."""

    def __init__(self, weight: ShardedParameter, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, group=self.group)[0]


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are cut over tp: [S, I/tp] → [T, O].

    forward   y = x Wᵀ  [S, O], partial → reduce-scatter → [T, O]
    backward  all-gather dy → [S, O];  dx = dy W  [S, I/tp];  dW = dyᵀ x  [O, I/tp], both complete
    """

    def __init__(self, weight: ShardedParameter, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return collectives.reduce_scatter_tokens(F.linear(x, self.weight), self.group)
