"""Parameters that know which part of which canonical tensor they are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megatron_core_impl.checkpoint.slicing import Slice, shape_of, tp_slice
from megatron_core_impl.config import TensorSpec, padded_vocab_size
from megatron_core_impl.mesh import Mesh


class ShardedParameter(nn.Parameter):
    """This rank's part of a canonical tensor.

    Rows beyond `piece` are run-time padding of the vocabulary: zero, without gradient, never stored.
    """

    spec: TensorSpec
    piece: Slice  # the part of the global tensor, without padding
    sees_all_tokens: bool  # False: its gradient on a tp rank comes from that rank's tokens only, and must be summed over tp

    @property
    def is_replicated(self) -> bool:
        """Whether every tp rank holds the whole tensor."""
        return self.spec.tp_dim is None


@dataclass(frozen=True)
class ParameterFactory:
    """Allocates the parameters of a model by canonical name, uninitialised: weights always come from a checkpoint."""

    specs: Mapping[str, TensorSpec]
    mesh: Mesh
    dtype: torch.dtype
    device: torch.device

    def __call__(self, name: str, *, sees_all_tokens: bool = True) -> ShardedParameter:
        spec, layout = self.specs[name], self.mesh.layout
        piece = tp_slice(spec, layout.tp, self.mesh.tp_rank)
        shape = list(shape_of(piece))
        if spec.padded:
            shape[0] = padded_vocab_size(spec.shape[0], layout.tp) // layout.tp
        parameter = ShardedParameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        parameter.spec, parameter.piece, parameter.sees_all_tokens = spec, piece, sees_all_tokens
        return parameter
