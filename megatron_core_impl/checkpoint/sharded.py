"""Stored weights, whatever their form: one reader that answers "give me slice S of tensor T", and the writers of our forms.

Forms, told apart by what a folder holds:

- ours, by `index.json`: canonical (one file), sharded for (tp, pp), or a training checkpoint (cut over dp as well, with the
  moments of the optimizer as further tensors). Each rank's file carries, in its header, the global shape and the slice of
  each of its tensors; the index is made of these headers alone.
- Hugging Face, by `model.safetensors`, `model.safetensors.index.json`, or, where pickles are allowed, their `.bin` kin.

So what was written under one layout loads under any other: a reader asks for slices, never for files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_core_impl.checkpoint.digests import DamagedFile, FileDigest, Follower, check_size, file_digest
from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype
from megatron_core_impl.checkpoint.durable import sync
from megatron_core_impl.checkpoint.index import (
    INDEX_FILE,
    Index,
    Piece,
    StoredTensor,
    intersect,
    merge_pieces,
    parse_slice,
    plain_file_name,
    read_index_file,
    read_object,
    write_index_file,
)
from megatron_core_impl.checkpoint.safetensors_io import (
    SafetensorsReader,
    SafetensorsWriter,
    WeightsError,
    check_slice,
    format_slice,
)
from megatron_core_impl.checkpoint.slicing import Slice, relative, row_blocks, shape_of, whole
from megatron_core_impl.checkpoint.source import TensorFile, WeightsSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RANK_FILES = "rank-*.safetensors"


class WeightsReader(WeightsSource):
    """The tensors of a folder by global slices. Made by `open_weights`.

    Args:
        index: what the folder holds. A Hugging Face folder has no digests, so its `files` are empty.
        files: those that are open already, by name.
    """

    def __init__(self, folder: Path, index: Index, files: dict[str, TensorFile]) -> None:
        self._folder = folder
        self.index = index
        self._tensors = index.tensors
        self._files = files
        self._described: dict[str, dict[str, StoredTensor]] = {}  # what our own files say of their pieces

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._folder

    @property
    def extra(self) -> dict[str, Any]:
        """Further keys of index.json, such as the layout."""
        return self.index.extra

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> Dtype:
        """Stored precision of a tensor."""
        return self._tensor(name).dtype

    def check(self, name: str, piece: Slice) -> None:
        """Refuse a slice that is not there, or that lies in files which are not what the index says.

        Raises:
            WeightsError: naming the file.
        """
        self._parts(name, piece)

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a slice, put together from the stored pieces it overlaps. Reads only the bytes of the slice.

        Raises:
            WeightsError: there is no such tensor or slice, or a file is missing, damaged or not what the index says.
        """
        tensor = self._tensor(name)
        piece = whole(tensor.shape) if piece is None else piece
        parts = self._parts(name, piece)
        if len(parts) == 1:
            file, origin, common = parts[0]
            return file.read_bytes(name, relative(common, origin))
        out: Bytes = np.empty((*shape_of(piece), tensor.dtype.itemsize), np.uint8)
        for file, origin, common in parts:
            for block in row_blocks(common, tensor.dtype.itemsize):
                place = tuple(slice(*bounds) for bounds in relative(block, piece))
                out[place] = file.read_bytes(name, relative(block, origin))
        return out

    def _parts(self, name: str, piece: Slice) -> list[tuple[TensorFile, Slice, Slice]]:
        """The files that hold a slice: (file, what it has of the tensor, what that is of the slice)."""
        tensor = self._tensor(name)
        check_slice(f"{self.folder}: {name}", tensor.shape, piece)
        # Every file is checked against the index before memory is taken at the word of the index.
        return [
            (self._file(name, tensor, stored), stored.slice, common)
            for stored in tensor.pieces
            if (common := intersect(stored.slice, piece)) is not None
        ]

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise WeightsError(f"{self.folder}: holds no tensor {name} (of {len(self._tensors)} tensors in all)")
        return self._tensors[name]

    def _file(self, name: str, tensor: StoredTensor, piece: Piece) -> TensorFile:
        if piece.file not in self._files:
            opened = SafetensorsReader(self.folder / piece.file)
            self._files[piece.file] = opened
            self._described[piece.file] = dict(_described_pieces(opened)) if "pieces" in opened.metadata else {}
        file, where = self._files[piece.file], f"{self.folder / piece.file}: {name}"
        says, needs = file.tensors.get(name), (tensor.dtype, shape_of(piece.slice))
        if says != needs:
            held = "holds no such tensor" if says is None else f"holds {says[0]} {list(says[1])}"
            raise WeightsError(f"{where}: the index says {needs[0]} {list(needs[1])}, the file {held}")
        described = self._described.get(piece.file, {}).get(name)
        if described is not None and (described.shape, described.pieces[0].slice) != (tensor.shape, piece.slice):
            raise WeightsError(
                f"{where}: the index says {format_slice(piece.slice)} of {list(tensor.shape)}, the file holds "
                f"{format_slice(described.pieces[0].slice)} of {list(described.shape)}"
            )
        return file

    def check_headers(self) -> None:
        """Compare what the index says with the headers of all files. Reads no tensor. `read` does so for what it reads.

        Raises:
            WeightsError: naming a file that is missing, or holds something else than the index says, or more.
        """
        told: dict[str, set[str]] = {}
        for name, tensor in self._tensors.items():
            for piece in tensor.pieces:
                self._file(name, tensor, piece)
                told.setdefault(piece.file, set()).add(name)
        for file, names in told.items():
            if more := self._described.get(file, {}).keys() - names:
                raise WeightsError(f"{self.folder / file}: holds {min(more)}, of which the index says nothing")


def open_weights(folder: Path, *, allow_pickle: bool = False) -> WeightsReader:
    """Open a folder of weights of any form (see the top of this file).

    Args:
        folder: where `index.json` lies, or the files of a Hugging Face model.
        allow_pickle: read `.bin` files too, where there is nothing better. Never runs code from them (`weights_only`).

    Raises:
        WeightsError: there are no weights, a file is missing, or something in them is malformed or inconsistent.
    """
    if (folder / INDEX_FILE).is_file():
        index = read_index_file(folder / INDEX_FILE)
        for name, recorded in index.files.items():
            try:
                check_size(folder, name, recorded, INDEX_FILE)
            except DamagedFile as error:
                raise WeightsError(str(error)) from None
        return WeightsReader(folder, index, {})
    files = _open_hugging_face(folder, allow_pickle)
    found: dict[str, StoredTensor] = {}
    for file_name, file in files.items():
        for name, (dtype, shape) in file.tensors.items():
            found.setdefault(name, StoredTensor(dtype, shape, (Piece(file_name, whole(shape)),)))
    return WeightsReader(folder, Index(found, {}, {}), files)


def _open_hugging_face(folder: Path, allow_pickle: bool) -> dict[str, TensorFile]:
    """The files of a Hugging Face model by name, in the order of their index."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": SafetensorsReader(folder / "model.safetensors")}
    if (folder / "model.safetensors.index.json").is_file():
        return _open_listed(folder / "model.safetensors.index.json", SafetensorsReader)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not allow_pickle:
        raise WeightsError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can carry code. Choose a revision with safetensors, "
            "or set model.allow_pickle: true"
        )
    from megatron_core_impl.checkpoint.pickled import PickledReader  # needs PyTorch

    if (folder / "pytorch_model.bin").is_file():
        return {"pytorch_model.bin": PickledReader(folder / "pytorch_model.bin")}
    if (folder / "pytorch_model.bin.index.json").is_file():
        return _open_listed(folder / "pytorch_model.bin.index.json", PickledReader)
    raise WeightsError(f"{folder}: no weights: neither {INDEX_FILE} nor model.safetensors nor model.safetensors.index.json")


def _open_listed(index: Path, reader: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    """The files that a Hugging Face index lists, checked against it."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightsError(f"{index}: weight_map must map tensors to files")
    files: dict[str, TensorFile] = {}
    for name, file_name in listed.items():
        plain_file_name(f"{index}: {name}", file_name)
        if file_name not in files:
            if not (index.parent / file_name).is_file():
                raise WeightsError(f"{index.parent / file_name}: missing, and {index.name} needs it")
            files[file_name] = reader(index.parent / file_name)
        if name not in files[file_name].tensors:
            raise WeightsError(f"{index.parent / file_name}: holds no tensor {name}, which {index.name} says is there")
    return files


def open_rank_file(
    folder: Path,
    rank: int,
    entries: Iterable[tuple[str, torch.dtype | Dtype, tuple[int, ...], Slice]],
    follower: Follower | None = None,
) -> SafetensorsWriter:
    """Begin a rank's file: the writer of `rank-NNNN.safetensors` for pieces (name, dtype, global shape, slice)."""
    entries = list(entries)
    pieces = {name: {"shape": list(shape), "slice": [list(r) for r in piece]} for name, _, shape, piece in entries}
    metadata = {"format": "pt", "pieces": json.dumps(pieces, separators=(",", ":"))}
    stored = [(name, dtype, shape_of(piece)) for name, dtype, _, piece in entries]
    return SafetensorsWriter(folder / f"rank-{rank:04d}.safetensors", stored, metadata, follower)


def write_rank_file(folder: Path, rank: int, pieces: Iterable[tuple[str, tuple[int, ...], Slice, Tensor]]) -> FileDigest:
    """Write all that a rank stores: (name, global shape, slice, the slice's values), on any device. Fsynced.

    Returns:
        Size and digest of the file, taken while it was written.
    """
    given = {name: (shape, piece, tensor) for name, shape, piece, tensor in pieces}
    with open_rank_file(folder, rank, ((name, t.dtype, shape, piece) for name, (shape, piece, t) in given.items())) as writer:
        for name in writer.names:
            tensor = given[name][2]
            for rows in row_blocks(whole(tensor.shape), tensor.element_size()):
                writer.write_rows(name, rows[0][0] if rows else 0, tensor[slice(*rows[0])] if rows else tensor)
    sync(writer.path)
    return writer.digest


def write_index(folder: Path, digests: Mapping[str, FileDigest] | None = None, **extra: Any) -> Index:
    """Write `index.json` for the rank files in a folder, from their headers.

    Args:
        folder: where all ranks have written.
        digests: of the rank files, where they are known by name; files without one are read for it.
        extra: further keys of the index, JSON values, such as `layout` or `step`.

    Raises:
        WeightsError: a header is malformed, two files disagree, or the pieces of a tensor do not tile it exactly: a rank's
            file is missing, or two ranks wrote the same part.
    """
    tensors = described_tensors(folder)
    known = digests or {}
    files = {path.name: known.get(path.name) or file_digest(path) for path in sorted(folder.glob(RANK_FILES))}
    index = Index(tensors, files, extra)
    write_index_file(folder, index)
    return index


def described_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the headers of the rank files in a folder say that they hold. Raises as `write_index` does."""
    readers = (SafetensorsReader(path) for path in sorted(folder.glob(RANK_FILES)))
    return merge_pieces(folder, (found for reader in readers for found in _described_pieces(reader)))


def _described_pieces(reader: SafetensorsReader) -> Iterator[tuple[str, StoredTensor]]:
    """What the header of a rank's file says, each piece as a tensor of one piece."""
    path = reader.path
    try:
        described = json.loads(reader.metadata["pieces"])
        entries = {name: (tuple(described[name]["shape"]), described[name]["slice"]) for name in reader.tensors}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise WeightsError(f"{path}: not a rank's file: its header does not say which slices it holds") from None
    for name, (shape, ranges) in entries.items():
        dtype, stored_shape = reader.tensors[name]
        piece = parse_slice(f"{path}: {name}", ranges)
        if shape_of(piece) != stored_shape:
            raise WeightsError(f"{path}: {name}: its slice has shape {shape_of(piece)}, its data {stored_shape}")
        yield name, StoredTensor(dtype, shape, (Piece(path.name, piece),))


def count_bytes(reader: WeightsSource, names: Iterable[str]) -> int:
    """Bytes of the values of some tensors, as stored."""
    return sum(math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in names)
