"""Parameters that know which part of which canonical tensor they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_core_impl.checkpoint.slicing import Slice, replica, shape_of, tp_slice
from megatron_core_impl.config import TensorSpec, padded_vocab_size
from megatron_core_impl.mesh import Mesh


class GradientSink(Protocol):
    """Takes the gradients of a parameter, one per backward pass, where the optimizer wants them: `.grad` is not used then."""

    def add(self, grad: Tensor) -> None:
        """Take a gradient of the parameter's shape."""

    def add_product(self, grad_output: Tensor, x: Tensor) -> None:
        """Take the gradient of a linear layer's weight, dyᵀ x: [S, O], [S, I] → [O, I]."""

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """Take the gradient of an embedding without making it whole: `grad` [S, I] adds to the rows with numbers `rows` [S]."""


class ShardedParameter(nn.Parameter):
    """This rank's part of a canonical tensor.

    Rows beyond `piece` are run-time padding of the vocabulary: zero, without gradient, never stored.
    """

    spec: TensorSpec
    piece: Slice  # the part of the global tensor, without padding
    sees_all_tokens: bool  # False: its gradient on a tp rank comes from that rank's tokens only, and must be summed over tp

    sink: GradientSink | None = None  # None: gradients go to `.grad`, by autograd
    replica: int  # of all ranks of one dp rank that hold the same numbers, the 0th counts them in the norm and writes them

    @property
    def is_kv_replicated(self) -> bool:
        """Whether other tp ranks may hold it, for their own query heads: its gradient is summed over `Mesh.kv_group`."""
        return self.spec.heads is not None and self.spec.heads.is_kv

    @property
    def is_at_both_ends(self) -> bool:
        """Whether it is a tied embedding: the first and the last pp rank hold it, and its gradient is the sum of both."""
        return self.spec.place == "ends"


def weight_gradient(weight: ShardedParameter, grad_output: Tensor, x: Tensor) -> Tensor | None:
    """dyᵀ x for autograd, [S, O], [S, I] → [O, I]; None where the parameter's sink has taken it."""
    if weight.sink is None:
        return grad_output.t() @ x
    weight.sink.add_product(grad_output, x)
    return None


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
        parameter.replica = replica(spec, layout, self.mesh.pp_rank, self.mesh.tp_rank)
        return parameter
