"""Weights under foreign names, fused otherwise than ours: one table tells how, and is read in both directions.

The table is a list of `StackedTensor`s: each foreign tensor as rows of canonical ones, one below the other. A reader that
rearranges by it shows the foreign tensors of canonical weights; by the table turned round, the canonical tensors of a foreign
folder. Slices are read through, so either way costs only the bytes that are asked for. Nothing here knows a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.slicing import Slice, shape_of, whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import Range, Rows, StackedTensor

if TYPE_CHECKING:
    from torch import Tensor

Matrix = tuple[int, int]
Numbers = TypeVar("Numbers", "Tensor", Bytes)


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
    if len(parts) == 1:
        return parts[0]
    import torch

    return torch.cat(parts)


class Rearranged(WeightsSource):
    """The tensors of a table, read out of the tensors that it is made of.

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

    def dtype(self, name: str) -> Dtype:
        """Stored precision of a tensor.

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

    def check(self, name: str, piece: Slice) -> None:
        """See `WeightsSource`."""
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        for _, rows, wanted in _within(self._parts(name), piece[0]):
            (first, last), columns = _blocks(rows, wanted), piece[1:]
            self.source.check(rows.tensor, ((rows.start + first, rows.start + last), *columns))

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """See `WeightsSource`."""
        shape = self.shape(name)
        piece = whole(shape) if piece is None else piece
        check_slice(f"{self.folder}: {name}", shape, piece)
        sources = list(_within(self._parts(name), piece[0]))
        if len(sources) == 1:
            ((_, rows, wanted),) = sources
            return self._rows(rows, wanted, piece[1:])
        self.check(name, piece)  # before memory is taken
        out: Bytes = np.empty((*shape_of(piece), self.dtype(name).itemsize), np.uint8)
        for at, rows, wanted in sources:
            out[slice(*at)] = self._rows(rows, wanted, piece[1:])
        return out

    def _rows(self, rows: Rows, wanted: Range, columns: Slice) -> Bytes:
        """Some of the rows of a part: `wanted` counts from its first, in the order that the part gives them."""
        first, last = _blocks(rows, wanted)
        read = self.source.read_bytes(rows.tensor, ((rows.start + first, rows.start + last), *columns))
        return _in_order(read, rows.transposed)[wanted[0] - first : wanted[1] - first]

    def _parts(self, name: str) -> tuple[Rows, ...]:
        if name not in self._table:
            raise WeightsError(f"{self.folder}: has no tensor {name}")
        return self._table[name]


def _in_order(rows: Numbers, transposed: Matrix | None) -> Numbers:
    """Rows as a part of a table gives them: contiguous where they are not in order, a view where they are."""
    if transposed is None:
        return rows
    return rows.reshape(-1, *transposed, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _blocks(rows: Rows, wanted: Range) -> Range:
    """The rows of a part that must be read for some of it: whole blocks, where rows are put in order together."""
    block = math.prod(rows.transposed or (1,))
    return wanted[0] // block * block, -(-wanted[1] // block) * block


def _within(parts: Iterable[Rows], wanted: Range) -> Iterator[tuple[Range, Rows, Range]]:
    """The parts of a range of rows: (their place in the range, the part, which of its rows)."""
    begin = 0
    for rows in parts:
        end = begin + rows.stop - rows.start
        first, last = max(begin, wanted[0]), min(end, wanted[1])
        if first < last:
            yield (first - wanted[0], last - wanted[0]), rows, (first - begin, last - begin)
        begin = end
