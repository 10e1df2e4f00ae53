"""Linear layers cut over the tp group (https://arxiv.org/abs/1909.08053, with the sequence parallelism of 2205.05198).

Letters: T tokens of this rank, S = T·tp tokens of the micro batch, I and O features in and out of the whole layer.
Weights are stored as [O, I], like those of `torch.nn.Linear`. Their gradients go where `weight_gradient` takes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.parameter import ShardedParameter, weight_gradient


class _ColumnLinear(torch.autograd.Function):
    # The weights are kept by hand, here and below: a recomputed layer's saved tensors are plain ones, which know no sink.

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, count: int, *parameters: ShardedParameter | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        ctx.group, ctx.weights, ctx.biases = group, weights, biases
        ctx.save_for_backward(x)
        gathered = collectives.all_gather(x, group).wait()  # [S, I]
        return tuple(F.linear(gathered, weight, bias) for weight, bias in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gathering = collectives.all_gather(x, ctx.group)  # under the products of the input's gradient
        grad_x = grads[0] @ ctx.weights[0]
        for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        gathered = gathering.wait()
        reducing = collectives.reduce_scatter(grad_x, ctx.group)  # under the products of the weights' gradients
        grad_weights = [weight_gradient(weight, grad, gathered) for weight, grad in zip(ctx.weights, grads, strict=True)]
        grad_biases = [None if bias is None else grad.sum(0) for bias, grad in zip(ctx.biases, grads, strict=True)]
        return reducing.wait(), None, None, *grad_weights, *grad_biases


def column_linear(
    x: Tensor, *weights: ShardedParameter, group: Group, biases: Sequence[ShardedParameter | None] | None = None
) -> tuple[Tensor, ...]:
    """`x Wᵀ + b` for several weights whose rows are cut over tp; the input is gathered once for all of them.

    Args:
        x: [T, I], this rank's tokens.
        weights: [O/tp, I] each.
        group: tp.
        biases: [O/tp] or None for each weight; default: none has one.

    Returns:
        [S, O/tp] for each weight.

    forward   all-gather x            → [S, I];  y = x Wᵀ + b               [S, O/tp]
    backward  all-gather x again (only this rank's [T, I] is kept);  dW = dyᵀ x  [O/tp, I],  db = Σ dy  [O/tp], complete
              dx = Σ dy W  [S, I], partial → reduce-scatter → [T, I]
    """
    biases = [None] * len(weights) if biases is None else biases
    return _ColumnLinear.apply(x, group, len(weights), *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are cut over tp: [T, I] → [S, O/tp]. See `column_linear`."""

    def __init__(self, weight: ShardedParameter, group: Group, bias: ShardedParameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, group=self.group, biases=[self.bias])[0]


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ShardedParameter, bias: ShardedParameter | None, group: Group) -> Tensor:
        ctx.group, ctx.weight, ctx.bias = group, weight, bias
        ctx.save_for_backward(x)
        if group is None:
            return F.linear(x, weight, bias)
        y = collectives.reduce_scatter(F.linear(x, weight), group).wait()
        return y if bias is None else y.add_(bias)  # now, on whole sums: before, every rank would add it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gathering = collectives.all_gather(grad, ctx.group)
        grad_bias = None if ctx.bias is None else grad.sum(0)
        gathered = gathering.wait()  # [S, O]
        return gathered @ ctx.weight, weight_gradient(ctx.weight, gathered, x), grad_bias, None


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are cut over tp: [S, I/tp] → [T, O].

    Its bias sees this rank's tokens only (`sees_all_tokens=False`).

    forward   y = x Wᵀ  [S, O], partial → reduce-scatter → [T, O];  y + b
    backward  db = Σ dy over this rank's tokens;  all-gather dy → [S, O];  dx = dy W  [S, I/tp];  dW = dyᵀ x  [O, I/tp]
    """

    def __init__(self, weight: ShardedParameter, group: Group, bias: ShardedParameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _RowLinear.apply(x, self.weight, self.bias, self.group)  # type: ignore[no-any-return, no-untyped-call]
