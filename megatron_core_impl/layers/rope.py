"""Rotary position embedding (https://arxiv.org/abs/2104.09864), in the half-split convention of Hugging Face.

Feature i of a head is turned together with feature i + D/2. Meta's own weights pair 2i with 2i + 1 instead; they are permuted
at import, and there is no switch for it here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The angles of all positions of a micro batch: [S, 1, D/2], or [B, S, 1, D/2] where sequences differ."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The angles of positions [S] or [B, S]. Computed in fp32 (fp64 where `dtype` is), then rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions[..., None, None].to(wide) * (1.0 / theta**exponents)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    turned = torch.empty_like(x)
    first, second = turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=direction)
    return turned


class _Rotate(torch.autograd.Function):
    """forward  turn by the angle;  backward  turn back. Keeps nothing of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn queries or keys [B, S, heads, D] by their positions."""
    return _Rotate.apply(x, by.cos, by.sin)  # type: ignore[no-any-return, no-untyped-call]
