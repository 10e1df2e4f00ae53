"""Weights whose vocabulary has more rows than are stored: those of added tokens.

What they begin as (`NewRows`):

    mean     the mean of the stored rows. A row of zeros, or of noise, would make a new token's logit stand out among those of
             tokens that training moved together; the mean row gives it the average logit
             (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)
    normal   drawn around that mean, each column with the standard deviation that the stored rows have there: as the mean, but
             several new tokens differ from the start
    last     a copy of the last stored row, as Megatron-LLM pads a vocabulary
    zeros

Means and deviations are summed in fp64, and draws depend on nothing but which of the growing tensors it is and the number of
the row: the same bits whatever slices are asked for, whatever the tensors are called, on any machine.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import check_slice, row_blocks
from megatron_core_impl.checkpoint.sharded import WeightsSource
from megatron_core_impl.checkpoint.slicing import Slice, shape_of, whole
from megatron_core_impl.config import NewRows, Range


class Grown:
    """A `WeightsSource` that shows some tensors of another with further rows.

    Args:
        source: what is stored.
        names: the tensors that grow, the embedding first: one row for each id of the vocabulary.
        rows: how many they have then.
        new_rows: what those begin as that are not stored.
    """

    def __init__(self, source: WeightsSource, names: Sequence[str], rows: int, new_rows: NewRows = "mean") -> None:
        self.source = source
        self.rows = rows
        self.new_rows = new_rows
        self._grown = tuple(names)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

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
        out = torch.empty(shape_of(piece), dtype=dtype or self.dtype(name))
        if start < stored:
            out[: stored - start] = self.source.read(name, ((start, stored), *piece[1:]), dtype)
        columns = tuple(slice(*bounds) for bounds in piece[1:])
        first = max(start, stored)
        new = self._new(name, (first, stop)).to(self.dtype(name))  # rounded once, to what the stored rows have
        out[first - start :] = new[:, *columns]
        return out

    def _new(self, name: str, rows: Range) -> Tensor:
        """Rows that are not stored, whole, in fp64 where they are computed."""
        stored, *rest = self.source.shape(name)
        count = rows[1] - rows[0]
        match self.new_rows:
            case "mean":
                return self._mean_and_deviation(name)[0].expand(count, *rest)
            case "zeros":
                return torch.zeros(count, *rest)
            case "last":
                return self.source.read(name, ((stored - 1, stored), *whole(rest))).expand(count, *rest)
            case "normal":
                mean, deviation = self._mean_and_deviation(name)
                return torch.stack([mean + deviation * _noise(self._grown.index(name), row, rest) for row in range(*rows)])

    def _mean_and_deviation(self, name: str) -> tuple[Tensor, Tensor]:
        """Of the stored rows, column by column; read some rows at a time."""
        if name not in self._moments:
            shape = self.source.shape(name)
            total, squares = torch.zeros(2, *shape[1:], dtype=torch.float64)
            for rows in row_blocks(whole(shape), torch.float64.itemsize):
                block = self.source.read(name, rows, torch.float64)
                total += block.sum(0)
                squares += block.square_().sum(0)
            mean = total / shape[0]
            self._moments[name] = mean, (squares / shape[0] - mean.square()).clamp_(min=0).sqrt_()
        return self._moments[name]


def _noise(tensor: int, row: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that are a tensor's and a row's own. NumPy keeps the stream of this generator for ever."""
    return torch.from_numpy(np.random.RandomState([tensor, row]).standard_normal(tuple(shape)))
