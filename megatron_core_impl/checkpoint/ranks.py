"""The files of another system's ranks as one model: read by global slices of canonical tensors, and proven from the other side.

Each rank stores slices of the canonical tensors, fused and ordered by its table (`RankForm`). `open_ranks` reads canonical
tensors through the tables turned round. `prove_ranks` goes the other way: out of canonical weights it makes every tensor of
every rank again, and compares it with the file, bit for bit. Both together show that nothing was lost and nothing made up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype
from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.index import Index, Piece, StoredTensor, intersect, merge_pieces
from megatron_core_impl.checkpoint.proven import NotEqual, Progress, same_bits
from megatron_core_impl.checkpoint.reshard import list_names
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice, format_slice
from megatron_core_impl.checkpoint.sharded import WeightsReader, count_bytes
from megatron_core_impl.checkpoint.slicing import Slice, row_blocks, shape_of, whole
from megatron_core_impl.checkpoint.source import TensorFile, WeightsSource
from megatron_core_impl.config import RankForm, Rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredRank:
    """What a rank stores, and the file in which it does."""

    name: str  # of the file, for messages
    file: TensorFile
    form: RankForm


class Part(WeightsSource):
    """Slices of the tensors of a source, as tensors of their own."""

    def __init__(self, source: WeightsSource, pieces: Mapping[str, Slice]) -> None:
        self.source = source
        self.pieces = pieces

    @property
    def folder(self) -> Path:
        """Where the source lies, for messages."""
        return self.source.folder

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of which there is a slice."""
        return tuple(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a slice."""
        return shape_of(self.pieces[name])

    def dtype(self, name: str) -> Dtype:
        """Stored precision of a tensor."""
        return self.source.dtype(name)

    def check(self, name: str, piece: Slice) -> None:
        """See `WeightsSource`."""
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        self.source.check(name, self._of_source(name, piece))

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """See `WeightsSource`."""
        piece = whole(self.shape(name)) if piece is None else piece
        check_slice(f"{self.folder}: {name}", self.shape(name), piece)
        return self.source.read_bytes(name, self._of_source(name, piece))

    def _of_source(self, name: str, piece: Slice) -> Slice:
        return tuple((base + a, base + b) for (a, b), (base, _) in zip(piece, self.pieces[name], strict=True))


class _Canonical(TensorFile):
    """A rank's file as a file of canonical slices."""

    def __init__(self, folder: Path, rank: StoredRank) -> None:
        self._reader = Rearranged(_as_source(folder, rank), invert(rank.form.table))
        self.tensors = {name: (self._reader.dtype(name), self._reader.shape(name)) for name in self._reader.names}

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        return self._reader.read_bytes(name, piece)


def open_ranks(folder: Path, shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[StoredRank]) -> WeightsReader:
    """The canonical tensors of a model whose ranks stored it. Reads no tensor.

    Args:
        folder: where the files lie, for messages.
        shapes: of the canonical tensors.

    Raises:
        WeightsError: a rank lacks a tensor, has one too many or one of another shape, or the ranks do not make up the model.
    """
    files: dict[str, TensorFile] = {}
    found: list[tuple[str, StoredTensor]] = []
    for rank in ranks:
        _check(folder, rank)
        files[rank.name] = file = _Canonical(folder, rank)
        for name in rank.form.counted:
            piece = Piece(rank.name, rank.form.pieces[name])
            found.append((name, StoredTensor(file.tensors[name][0], shapes[name], (piece,))))
    tensors = merge_pieces(folder, found)
    if missing := [name for name in shapes if name not in tensors]:
        raise WeightsError(f"{folder}: lacks {list_names(missing)}")
    return WeightsReader(folder, Index({name: tensors[name] for name in shapes}, {}, {}), files)


def prove_ranks(source: WeightsSource, ranks: Sequence[StoredRank], progress: Progress) -> None:
    """Compare every tensor of every rank with what the rank would store of canonical weights.

    Raises:
        NotEqual: naming the file and the tensor.
        WeightsError: two files hold copies of a tensor that differ: naming both.
    """
    stored = [(rank, _as_source(source.folder, rank)) for rank in ranks]
    total, done = sum(count_bytes(file, file.names) for _, file in stored), 0
    for rank, file in stored:
        again = rank_tensors(source, rank.form)
        for name in again.names:
            for block in row_blocks(whole(again.shape(name)), again.dtype(name).itemsize):
                if not same_bits(again.read(name, block), file.read(name, block)):
                    _refuse_other_copy(source.folder, ranks, rank, name)
                    raise NotEqual(f"{rank.name}: {name} is not what the model's weights give there, in {format_slice(block)}")
            done += count_bytes(file, [name])
            progress(done, total, f"comparing {rank.name}")


def _refuse_other_copy(folder: Path, ranks: Sequence[StoredRank], rank: StoredRank, name: str) -> None:
    """Tell of a rank's tensor that is a copy of what another rank holds: the model has the other's numbers, which differ."""
    parts = {rows.tensor for stacked in rank.form.table if stacked.name == name for rows in stacked.parts}
    for part in sorted(parts - rank.form.counted):
        for other in ranks:
            if part in other.form.counted and intersect(other.form.pieces[part], rank.form.pieces[part]) is not None:
                raise WeightsError(
                    f"{rank.name}: {name} differs from that of {other.name}: both hold copies of the same numbers. One of the "
                    "files is damaged, or of another checkpoint"
                )


def up_to(rank: StoredRank, names: Collection[str], rows: int) -> StoredRank:
    """A rank of which only the first rows of some canonical tensors count: the vocabulary, where the rest is cut off.

    These tensors lie by themselves in a file, fused with none.
    """
    pieces = {
        name: tuple((min(a, rows), min(b, rows)) if name in names and dim == 0 else (a, b) for dim, (a, b) in enumerate(piece))
        for name, piece in rank.form.pieces.items()
    }
    table = tuple(
        replace(each, parts=(Rows(name, 0, shape_of(pieces[name])[0]),)) if (name := each.parts[0].tensor) in names else each
        for each in rank.form.table
    )
    return replace(rank, form=replace(rank.form, pieces=pieces, table=table))


def rank_tensors(source: WeightsSource, form: RankForm) -> Rearranged:
    """The tensors that a rank stores of canonical weights."""
    return Rearranged(Part(source, form.pieces), form.table)


def blocks(source: WeightsSource, name: str) -> Iterator[Tensor]:
    """A tensor in blocks of rows."""
    for block in row_blocks(whole(source.shape(name)), source.dtype(name).itemsize):
        yield source.read(name, block)


def _as_source(folder: Path, rank: StoredRank) -> WeightsReader:
    tensors = {
        name: StoredTensor(dtype, shape, (Piece(rank.name, whole(shape)),))
        for name, (dtype, shape) in rank.file.tensors.items()
    }
    return WeightsReader(folder, Index(tensors, {}, {}), {rank.name: rank.file})


def _check(folder: Path, rank: StoredRank) -> None:
    expected = {
        stacked.name: (
            sum(rows.stop - rows.start for rows in stacked.parts), *shape_of(rank.form.pieces[stacked.parts[0].tensor])[1:],
        )
        for stacked in rank.form.table
    }  # fmt: skip
    held = {name: shape for name, (_, shape) in rank.file.tensors.items()}
    where = f"{folder / rank.name}"
    for name, shape in expected.items():
        if name in held and held[name] != shape:
            raise WeightsError(f"{where}: {name} has shape {list(held[name])}, the model needs {list(shape)} there")
    if missing := [name for name in expected if name not in held]:
        raise WeightsError(f"{where}: lacks {list_names(missing)}")
    if unexpected := [name for name in held if name not in expected]:
        raise WeightsError(f"{where}: holds tensors that the model does not have there: {list_names(unexpected)}")
