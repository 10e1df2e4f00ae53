"""From a description to a model that is ready: the order of steps in one place."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.slicing import Slice, shape_of
from megatron_core_impl.config import Dropout, Kernel, ModelConfig, Recompute
from megatron_core_impl.layers.attention import choose_kernel
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import Transformer


class Reader(Protocol):
    """Gives slices of named tensors, whatever form they are stored in (`checkpoint.sharded.WeightsReader`)."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, piece: Slice | None = None, dtype: torch.dtype | None = None) -> Tensor: ...


def parallelize(
    config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype, dropout: Dropout | None = None, recompute: Recompute | None = None,
    kernel: Kernel | None = None,
) -> Transformer:  # fmt: skip
    """This rank's part of a model on its device, its weights still uninitialised.

    Raises:
        ValueError: the layout cannot hold the model, or the attention kernel cannot compute on this device; the message names
            what is legal.
    """
    has_dropout = dropout is not None and dropout.attention > 0
    choose_kernel(mesh.device, dtype, is_plain=True, has_dropout=has_dropout, wanted=kernel)  # refuses now or never
    return Transformer(config, mesh, dtype=dtype, device=mesh.device, dropout=dropout, recompute=recompute, kernel=kernel)


@torch.no_grad()
def load_weights(model: Transformer, reader: Reader) -> None:
    """Fill a model with a checkpoint's weights: of each tensor this rank's slice is read, one tensor at a time.

    Raises:
        ValueError: a tensor has not the shape that the model's configuration gives it.
    """
    for name, parameter in model.sharded_parameters().items():
        read_rows(reader, name, parameter.spec.shape, parameter.piece, into=parameter)


@torch.no_grad()
def read_rows(reader: Reader, name: str, shape: tuple[int, ...], piece: Slice, into: Tensor) -> None:
    """Read a slice of a tensor of a known shape into the first rows of `into`; the rest is padding, and becomes zero.

    Raises:
        ValueError: the tensor has another shape.
    """
    if (stored := tuple(reader.shape(name))) != shape:
        raise ValueError(f"{name} has shape {stored} in the checkpoint, but {shape} in the model's configuration")
    rows = shape_of(piece)[0]
    if rows:
        into[:rows].copy_(reader.read(name, piece, into.dtype))
    into[rows:].zero_()
