"""RMSNorm (https://arxiv.org/abs/1910.07467), rounded where transformers rounds."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_core_impl.layers.parameter import ShardedParameter


class _RMSNorm(torch.autograd.Function):
    """With n = x / sqrt(mean(x²) + eps):  y = w n;  dw = Σ dy n;  dx = (dn - n mean(dn n)) / sqrt(mean(x²) + eps), dn = w dy.

    Keeps x and one number per token. Statistics in fp32, or fp64 where x is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [T, 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_grad, wide_weight = grad.to(scale.dtype), weight.to(scale.dtype)
        normed = x * scale
        product = wide_grad * normed
        grad_weight = product.sum(0).to(weight.dtype)
        inner = (product @ wide_weight).div_(x.shape[-1]).unsqueeze_(-1)  # mean(dn n), [T, 1]
        grad_x = torch.mul(wide_grad, wide_weight, out=product).addcmul_(normed, inner, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Scales each token's features to a root mean square of 1, then by a weight: [T, H] → [T, H].

    It sees this rank's tokens only, so that its weight's gradient is summed over tp once per step (`parallel.finalize`).
    """

    def __init__(self, weight: ShardedParameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]
