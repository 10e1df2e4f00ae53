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

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype, Floats, from_floats, to_floats
from megatron_core_impl.checkpoint.safetensors_io import check_slice
from megatron_core_impl.checkpoint.slicing import Slice, row_blocks, shape_of, whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import NewRows, Range


class Grown(WeightsSource):
    """Shows some tensors of another with further rows.

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
        self._moments: dict[str, tuple[Floats, Floats]] = {}

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

    def dtype(self, name: str) -> Dtype:
        """Stored precision of a tensor."""
        return self.source.dtype(name)

    def check(self, name: str, piece: Slice) -> None:
        """See `WeightsSource`."""
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        self.source.check(name, piece if name not in self._grown else self._stored(name, piece))

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """See `WeightsSource`."""
        if name not in self._grown:
            return self.source.read_bytes(name, piece)
        piece = whole(self.shape(name)) if piece is None else piece
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        (start, stop), stored = piece[0], self.source.shape(name)[0]
        if stop <= stored:
            return self.source.read_bytes(name, piece)
        out: Bytes = np.empty((*shape_of(piece), self.dtype(name).itemsize), np.uint8)
        if start < stored:
            out[: stored - start] = self.source.read_bytes(name, self._stored(name, piece))
        first, columns = max(start, stored), tuple(slice(*bounds) for bounds in piece[1:])
        out[first - start :] = self._new(name, (first, stop))[:, *columns]
        return out

    def _stored(self, name: str, piece: Slice) -> Slice:
        """What of a slice is stored."""
        stored = self.source.shape(name)[0]
        return (min(piece[0][0], stored), min(piece[0][1], stored)), *piece[1:]

    def _new(self, name: str, rows: Range) -> Bytes:
        """Rows that are not stored, whole."""
        stored, *rest = self.source.shape(name)
        count, dtype = rows[1] - rows[0], self.dtype(name)
        match self.new_rows:
            case "zeros":
                return np.zeros((count, *rest, dtype.itemsize), np.uint8)
            case "last":
                last = self.source.read_bytes(name, ((stored - 1, stored), *whole(tuple(rest))))
                return np.broadcast_to(last, (count, *last.shape[1:]))
            case "mean":
                return np.broadcast_to(from_floats(self._mean_and_deviation(name)[0], dtype), (count, *rest, dtype.itemsize))
            case "normal":
                mean, deviation = self._mean_and_deviation(name)
                drawn = [mean + deviation * _noise(self._grown.index(name), row, rest) for row in range(*rows)]
                return from_floats(np.stack(drawn), dtype)

    def _mean_and_deviation(self, name: str) -> tuple[Floats, Floats]:
        """Of the stored rows, column by column; read some rows at a time."""
        if name not in self._moments:
            shape, dtype = self.source.shape(name), self.dtype(name)
            total, squares = np.zeros(shape[1:]), np.zeros(shape[1:])
            for rows in row_blocks(whole(shape), np.dtype(np.float64).itemsize):
                block = to_floats(self.source.read_bytes(name, rows), dtype)
                total += block.sum(0)
                squares += np.square(block).sum(0)
            mean = total / shape[0]
            self._moments[name] = mean, np.sqrt(np.maximum(squares / shape[0] - np.square(mean), 0))
        return self._moments[name]


def _noise(tensor: int, row: int, shape: Sequence[int]) -> Floats:
    """Standard normal numbers that are a tensor's and a row's own. NumPy keeps the stream of this generator for ever."""
    return np.random.RandomState([tensor, row]).standard_normal(tuple(shape))
