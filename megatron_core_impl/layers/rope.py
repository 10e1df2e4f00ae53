"""Rotary position embedding (https://arxiv.org/abs/2104.09864), in the half-split convention of Hugging Face.

Feature i of a head is turned together with feature i + D/2. Meta's own weights pair 2i with 2i + 1 instead; they are permuted
at import, and there is no switch for it here.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_core_impl.config import ModelConfig


@dataclass(frozen=True)
class Rotation:
    """The angles of all positions of a micro batch: [S, 1, D], or [B, S, 1, D] where sequences differ."""

    cos: Tensor  # both halves alike
    sin: Tensor  # negative in the first half


def rotation(positions: Tensor, speeds: Tensor, dtype: torch.dtype) -> Rotation:
    """The angles of positions [S] or [B, S]. Computed in the precision of `speeds`, then rounded to `dtype`.

    Args:
        speeds: [D/2], `frequencies` on the device of the positions. Made once per model: a copy from the host in every micro
            batch would wait for the device.
    """
    angles = positions[..., None, None].to(speeds.dtype) * speeds
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def frequencies(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """By how much each pair of features turns from one position to the next, in radians: [D/2].

    In fp32 (fp64 where `dtype` is), and on the CPU: other devices may round powers otherwise.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype) / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    # Llama 3: pairs that turn often within the original length stay, those that hardly turn slow down; in between it blends.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = (1 - share) * plain / scaling.factor + share * plain  # transformers' order, for its very bits
    return torch.where(share < 0, slow, torch.where(share > 1, plain, blend))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    turned, rolled = x * cos, x.roll(x.shape[-1] // 2, -1)  # rolled: the halves have changed places
    # PyTorch 2.11's compiler gives a function no gradient whose result was written in place; that of 2.13 does.
    add = turned.addcmul if torch.compiler.is_compiling() else turned.addcmul_
    return add(rolled, sin, value=direction)


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
