"""Weights whose vocabulary has more rows than are stored: the new ones are the mean of the old.

A row of zeros, or of noise, would make a new token's logit stand out among those of tokens that training moved together; the
mean row gives it the average logit (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import check_slice, row_blocks
from megatron_core_impl.checkpoint.sharded import WeightsSource
from megatron_core_impl.checkpoint.slicing import Slice, shape_of, whole


class Grown:
    """A `WeightsSource` that shows some tensors of another with further rows.

    Args:
        source: what is stored.
        names: the tensors that grow: one row for each id of the vocabulary.
        rows: how many they have then.
    """

    def __init__(self, source: WeightsSource, names: Collection[str], rows: int) -> None:
        self.source = source
        self.rows = rows
        self._grown = frozenset(names)
        self._means: dict[str, Tensor] = {}

    @property
    def folder(self) -> Path:
        """Where the source lies, for messages."""
        return self.source.folder

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return self.source.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor, new rows included."""
        shape = self.source.shape(name)
        return (max(self.rows, shape[0]), *shape[1:]) if name in self._grown else shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self.source.dtype(name)

    def read(self, name: str, piece: Slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A slice of a tensor, on the CPU and contiguous: see `WeightsReader.read`."""
        if name not in self._grown:
            return self.source.read(name, piece, dtype)
        piece = whole(self.shape(name)) if piece is None else piece
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        (start, stop), stored = piece[0], self.source.shape(name)[0]
        if stop <= stored:
            return self.source.read(name, piece, dtype)
        mean = self._mean(name)[tuple(slice(*bounds) for bounds in piece[1:])]
        out = mean.to(dtype or self.dtype(name)).expand(shape_of(piece)).clone()
        if start < stored:
            out[: stored - start] = self.source.read(name, ((start, stored), *piece[1:]), dtype)
        return out

    def _mean(self, name: str) -> Tensor:
        """The mean of the stored rows, in their precision; summed in fp64, some rows at a time."""
        if name not in self._means:
            shape, dtype = self.source.shape(name), self.dtype(name)
            total = torch.zeros(shape[1:], dtype=torch.float64)
            for rows in row_blocks(whole(shape), torch.float64.itemsize):
                total += self.source.read(name, rows, torch.float64).sum(0)
            self._means[name] = (total / shape[0]).to(dtype)
        return self._means[name]
