"""RMSNorm (https://arxiv.org/abs/1910.07467) and LayerNorm (1607.06450), rounded where transformers rounds.

Both see this rank's tokens only, so that the gradients of their weights are summed over tp once per step (`parallel.finalize`):
their parameters are made with `sees_all_tokens=False`. Letters: T tokens of this rank, H hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.layers.parameter import ShardedParameter

CACHED = 1 << 16  # numbers that a core of a CPU works on at a time: in single precision they stay in its cache


class _RMSNorm(torch.autograd.Function):
    """With n = x / sqrt(mean(x²) + eps):  y = w n;  dw = Σ dy n;  dx = (dn - n mean(dn n)) / sqrt(mean(x²) + eps), dn = w dy.

    Keeps x and one number per token. Statistics in fp32, or fp64 where x is. Works on some tokens at a time (`_parts`), in the
    same buffers, which stay in a CPU's cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = x.new_empty(len(x), 1, dtype=wide)
        y = torch.empty_like(x)
        for part, (room, product) in _parts(x, wide, 2):
            inputs = _widened(x[part], room)
            torch.mean(torch.mul(inputs, inputs, out=product), -1, keepdim=True, out=scale[part])
            scale[part].add_(eps).rsqrt_()
            y[part].copy_(torch.mul(inputs, scale[part], out=product)).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_weight = weight.to(scale.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(wide_weight)
        for part, (normed, room, product) in _parts(x, scale.dtype, 3):
            torch.mul(_widened(x[part], normed), scale[part], out=normed)
            wide_grad = _widened(grad[part], room)
            torch.mul(wide_grad, normed, out=product)
            grad_weight += product.sum(0)
            inner = (product @ wide_weight).div_(x.shape[-1]).unsqueeze_(-1)  # mean(dn n), [T, 1]
            torch.mul(wide_grad, wide_weight, out=product).addcmul_(normed, inner, value=-1)
            grad_x[part].copy_(product.mul_(scale[part]))
        return grad_x, grad_weight.to(weight.dtype), None


def _widened(x: Tensor, room: Tensor) -> Tensor:
    """`x` in the precision of `room`: itself, or a copy there."""
    return x if x.dtype == room.dtype else room.copy_(x)


def _parts(x: Tensor, dtype: torch.dtype, count: int) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Rows of which as many as fit into a CPU's cache are worked on at a time; GPUs and compilers take all at once.

    Yields:
        Which rows, and `count` buffers of their shape.
    """
    rows = max(1, len(x) if x.is_cuda or torch.compiler.is_compiling() else CACHED * torch.get_num_threads() // x.shape[-1])
    buffers = x.new_empty(count, min(rows, len(x)), *x.shape[1:], dtype=dtype)
    for start in range(0, len(x), rows):
        yield slice(start, start + rows), buffers[:, : len(x) - start].unbind()


class RMSNorm(nn.Module):
    """Scales each token's features to a root mean square of 1, then by a weight: [T, H] → [T, H]."""

    def __init__(self, weight: ShardedParameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class LayerNorm(nn.Module):
    """Shifts and scales each token's features to mean 0 and variance 1, then by a weight and a bias: [T, H] → [T, H]."""

    def __init__(self, weight: ShardedParameter, bias: ShardedParameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)  # statistics at least in fp32
