"""Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245), its heads cut over the tp group.

Letters: T tokens of this rank, B sequences of S tokens each (B·S = T·tp), H hidden, N query and K key/value heads of this
rank, D features per head. The kernel is chosen in `attend` and nowhere else.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.collectives import Group
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.layers.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from megatron_core_impl.layers.parameter import ParameterFactory
from megatron_core_impl.layers.rope import Rotation, rotate


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D, causal) v: [B, S, N, D], [B, S, K, D], [B, S, K, D] → [B, S, N, D].

    Query head n looks at key/value head n // (N/K). PyTorch picks the kernel: its FlashAttention on CUDA in bf16, a blocked
    one on the CPU; both take grouped heads as they are, and neither stores S × S numbers.
    """
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class SelfAttention(nn.Module):
    """[T, H] → [T, H]. Each tp rank computes its own heads for all tokens."""

    def __init__(self, config: ModelConfig, group: Group, parameter: ParameterFactory, prefix: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = group
        self.q_proj = ColumnParallelLinear(parameter(f"{prefix}.q_proj.weight"), group)
        self.k_proj = ColumnParallelLinear(parameter(f"{prefix}.k_proj.weight"), group)
        self.v_proj = ColumnParallelLinear(parameter(f"{prefix}.v_proj.weight"), group)
        self.o_proj = RowParallelLinear(parameter(f"{prefix}.o_proj.weight"), group)

    def forward(self, x: Tensor, rotation: Rotation, batch_size: int) -> Tensor:
        q, k, v = (
            y.view(batch_size, -1, y.shape[-1] // self.head_dim, self.head_dim)  # [B, S, heads, D]
            for y in column_linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, group=self.group)
        )
        y = attend(rotate(q, rotation), rotate(k, rotation), v)
        return self.o_proj(y.reshape(-1, y.shape[2] * self.head_dim))  # type: ignore[no-any-return]
