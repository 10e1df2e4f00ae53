"""Weights under foreign names, fused otherwise than ours: one table tells how, and is read in both directions.

The table is a list of `StackedTensor`s: each foreign tensor as rows of canonical ones, one below the other. A reader that
rearranges by it shows the foreign tensors of canonical weights; by the table turned round, the canonical tensors of a foreign
folder. Slices are read through, so either way costs only the bytes that are asked for. Nothing here knows a family.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.sharded import WeightsSource
from megatron_core_impl.checkpoint.slicing import Slice, shape_of, whole
from megatron_core_impl.config import Range, Rows, StackedTensor

Matrix = tuple[int, int]


def invert(table: Iterable[StackedTensor]) -> list[StackedTensor]:
    """The same table from the other side: each of the tensors that its parts name as rows of the table's tensors.

    Raises:
        ValueError: the parts of a tensor leave rows out or give some twice; the message names it.
    """
    found: dict[str, list[tuple[int, int, Rows]]] = {}  # of each part's tensor: rows start … stop-1 are these of the table's
    for stacked in table:
        end = 0
        for part in stacked.parts:
            begin, end = end, end + part.stop - part.start
            transposed = part.transposed and (part.transposed[1], part.transposed[0])
            found.setdefault(part.tensor, []).append((part.start, part.stop, Rows(stacked.name, begin, end, transposed)))
    inverse = []
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        end = 0
        for start, stop, _ in pieces:
            if start != end:
                raise ValueError(f"{name}: after its rows up to {end} the table gives those from {start} on")
            end = stop
        inverse.append(StackedTensor(name, tuple(rows for _, _, rows in pieces)))
    return inverse


def assemble(stacked: StackedTensor, tensor: Callable[[str], Tensor]) -> Tensor:
    """A tensor of a table in memory: a view where it is a part of one tensor. `tensor` gives those it is made of by name."""
    parts = [_in_order(tensor(rows.tensor)[rows.start : rows.stop], rows.transposed) for rows in stacked.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Rearranged:
    """The tensors of a table, read out of the tensors that it is made of. A `WeightsSource`, as its source is.

    Args:
        source: has the tensors that the table's parts name.
        table: the tensors that this reader shows.
    """

    def __init__(self, source: WeightsSource, table: Iterable[StackedTensor]) -> None:
        self.source = source
        self._table = {stacked.name: stacked.parts for stacked in table}

    @property
    def folder(self) -> Path:
        """Where the source lies, for messages."""
        return self.source.folder

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the table."""
        return tuple(self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor.

        Raises:
            WeightsError: the source lacks one of the tensors it is made of.
        """
        parts = self._parts(name)
        return (sum(rows.stop - rows.start for rows in parts), *self.source.shape(parts[0].tensor)[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor.

        Raises:
            WeightsError: the tensors it is made of have several.
        """
        first, *others = dict.fromkeys(rows.tensor for rows in self._parts(name))
        dtype = self.source.dtype(first)
        for other in others:
            if self.source.dtype(other) != dtype:
                raise WeightsError(
                    f"{self.folder}: {name} is made of {first} ({dtype}) and {other} ({self.source.dtype(other)}), "
                    "which must be of one precision"
                )
        return dtype

    def read(self, name: str, piece: Slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A slice of a tensor, on the CPU and contiguous: see `WeightsReader.read`."""
        shape = self.shape(name)
        piece = whole(shape) if piece is None else piece
        check_slice(f"{self.folder}: {name}", shape, piece)
        sources = list(_within(self._parts(name), piece[0]))
        if len(sources) == 1:
            ((_, rows, wanted),) = sources
            return self._rows(rows, wanted, piece[1:], dtype)
        out = torch.empty(shape_of(piece), dtype=self.dtype(name) if dtype is None else dtype)
        for at, rows, wanted in sources:
            out[slice(*at)] = self._rows(rows, wanted, piece[1:], dtype)
        return out

    def _rows(self, rows: Rows, wanted: Range, columns: Slice, dtype: torch.dtype | None) -> Tensor:
        """Some of the rows of a part: `wanted` counts from its first, in the order that the part gives them."""
        block = math.prod(rows.transposed or (1,))  # rows that are put in order together
        first, last = wanted[0] // block * block, -(-wanted[1] // block) * block
        read = self.source.read(rows.tensor, ((rows.start + first, rows.start + last), *columns), dtype)
        return _in_order(read, rows.transposed)[wanted[0] - first : wanted[1] - first]

    def _parts(self, name: str) -> tuple[Rows, ...]:
        if name not in self._table:
            raise WeightsError(f"{self.folder}: has no tensor {name}")
        return self._table[name]


def _in_order(rows: Tensor, transposed: Matrix | None) -> Tensor:
    """Rows as a part of a table gives them: contiguous where they are not in order, a view where they are."""
    if transposed is None:
        return rows
    return rows.reshape(-1, *transposed, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _within(parts: Iterable[Rows], wanted: Range) -> Iterator[tuple[Range, Rows, Range]]:
    """The parts of a range of rows: (their place in the range, the part, which of its rows)."""
    begin = 0
    for rows in parts:
        end = begin + rows.stop - rows.start
        first, last = max(begin, wanted[0]), min(end, wanted[1])
        if first < last:
            yield (first - wanted[0], last - wanted[0]), rows, (first - begin, last - begin)
        begin = end
