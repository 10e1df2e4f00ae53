"""Files of tensors, and weights that can be read by global slices: a folder's, or the same under other names, or in parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype, as_tensor
from megatron_core_impl.checkpoint.slicing import Slice, relative, row_blocks, shape_of, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorFile(ABC):
    """A file of tensors that can be read by slices.

    Attributes:
        tensors: precision and shape of each, by name.
    """

    tensors: dict[str, tuple[Dtype, tuple[int, ...]]]

    @abstractmethod
    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a tensor, or of a slice of it, as stored: contiguous.

        Raises:
            WeightsError: there is no such tensor or slice, or the file is damaged.
        """

    def read(self, name: str, piece: Slice | None = None) -> Tensor:
        """The same as a tensor."""
        data = self.read_bytes(name, piece)
        return as_tensor(data, self.tensors[name][0])


class WeightsSource(ABC):
    """Tensors by name. What only moves numbers reads their bytes, and never imports PyTorch."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where they lie, for messages."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> Dtype:
        """Stored precision of a tensor."""

    @abstractmethod
    def check(self, name: str, piece: Slice) -> None:
        """Raise WeightsError unless a slice is there to be read."""

    @abstractmethod
    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a tensor, or of a slice of it, as stored.

        Raises:
            WeightsError: there is no such tensor or slice, or a file is damaged.
        """

    def read(self, name: str, piece: Slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The same as a tensor: on the CPU, contiguous. `dtype` converts as `Tensor.to` does; default: as stored."""
        stored = self.dtype(name)
        if dtype is None or dtype == stored.torch:
            return as_tensor(self.read_bytes(name, piece), stored)
        import torch

        piece = whole(self.shape(name)) if piece is None else piece
        self.check(name, piece)  # before memory is taken
        out = torch.empty(shape_of(piece), dtype=dtype)
        for block in row_blocks(piece, stored.itemsize):
            place = tuple(slice(*bounds) for bounds in relative(block, piece))
            out[place] = as_tensor(self.read_bytes(name, block), stored)
        return out
