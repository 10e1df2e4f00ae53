"""What a folder of stored weights holds: for every tensor its dtype, its global shape and the pieces that make it up.

Our own folders say so in `index.json`:

    {"format": "megatron-flows weights", "version": 3, "layout": {"tp": 2, "pp": 1, "dp": 1},
     "files": {"rank-0000.safetensors": {"size": 6738421000, "blake3": "9f86d0…"}, …},
     "tensors": {"lm_head.weight": {"dtype": "bfloat16", "shape": [32000, 4096],
                                    "pieces": [{"file": "rank-0000.safetensors", "slice": [[0, 16000], [0, 4096]]}, …]}}}

An index that was parsed is consistent: the pieces of every tensor tile it exactly, without a gap or an overlap, and every file
that holds one has its digest there.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.digests import INDEX_FILE as INDEX_FILE
from megatron_core_impl.checkpoint.digests import FileDigest, format_digests, parse_digests
from megatron_core_impl.checkpoint.dtypes import NAMES, Dtype
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice, format_slice
from megatron_core_impl.checkpoint.slicing import Slice, shape_of
from megatron_core_impl.json_files import read_json
from megatron_core_impl.shown import shown

FORMAT = "megatron-flows weights"
VERSION = 3


@dataclass(frozen=True)
class Piece:
    """A stored slice of a tensor: under the tensor's name in a file of the folder."""

    file: str
    slice: Slice


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a folder."""

    dtype: Dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def intersect(a: Slice, b: Slice) -> Slice | None:
    """What two slices of a tensor have in common, None where that is nothing."""
    common = tuple((max(i, k), min(j, n)) for (i, j), (k, n) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def check_tiling(where: str, tensor: StoredTensor) -> None:
    """Refuse a tensor whose pieces do not tile it. `where` begins the message: the folder or file, and the tensor.

    Raises:
        WeightsError: naming the files of pieces that overlap, or what is missing.
    """
    volume = 0
    active: list[Piece] = []  # pieces that reach into the rows where the sweep stands
    for piece in sorted(tensor.pieces, key=lambda piece: piece.slice):
        check_slice(f"{where}: the piece in {piece.file}: the tensor", tensor.shape, piece.slice)
        size = math.prod(shape_of(piece.slice))
        if size == 0:
            continue
        if piece.slice:
            active = [other for other in active if other.slice[0][1] > piece.slice[0][0]]
        for other in active:
            if intersect(piece.slice, other.slice) is not None:
                raise WeightsError(
                    f"{where}: pieces overlap: {format_slice(other.slice)} in {other.file} and "
                    f"{format_slice(piece.slice)} in {piece.file}"
                )
        active.append(piece)
        volume += size
    expected = math.prod(tensor.shape)
    if volume != expected:
        files = ", ".join(sorted({piece.file for piece in tensor.pieces})) or "no file"
        raise WeightsError(
            f"{where}: its pieces (in {files}) hold {volume:,} of the {expected:,} numbers of shape {list(tensor.shape)}: "
            "the file of a rank is missing"
        )


@dataclass(frozen=True)
class Index:
    """All that an index.json says."""

    tensors: dict[str, StoredTensor]
    files: dict[str, FileDigest]
    extra: dict[str, Any]  # further keys, such as the layout


def write_index_file(folder: Path, index: Index) -> None:
    """Write index.json."""
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **index.extra, "files": format_digests(index.files)}
    content["tensors"] = {
        name: {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "pieces": [{"file": piece.file, "slice": [list(bounds) for bounds in piece.slice]} for piece in tensor.pieces],
        }
        for name, tensor in index.tensors.items()
    }
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_index_file(path: Path) -> Index:
    """What an index.json says.

    Raises:
        WeightsError: it is not ours, malformed, the pieces of a tensor do not tile it, or a file has no digest.
    """
    content = read_object(path)
    kind, version = content.get("format"), content.get("version")
    if kind != FORMAT or version != VERSION:
        raise WeightsError(f"{path}: is {shown(kind)}, version {shown(version)}; this reads {FORMAT!r}, version {VERSION}")
    try:
        files = parse_digests(content.get("files"))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    tensors = {}
    for name, entry in _object(path, "tensors", content.get("tensors")).items():
        where = f"{path}: {name}"
        tensor = _parse_tensor(where, _object(path, name, entry))
        for piece in tensor.pieces:
            if piece.file not in files:
                raise WeightsError(f"{where}: a piece lies in {piece.file}, which has no digest in files")
        check_tiling(where, tensor)
        tensors[name] = tensor
    own = ("format", "version", "files", "tensors")
    return Index(tensors, files, {key: value for key, value in content.items() if key not in own})


def _parse_tensor(where: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, pieces = entry.get("dtype"), entry.get("shape"), entry.get("pieces")
    if not isinstance(dtype, str) or dtype not in NAMES:
        raise WeightsError(f"{where}: dtype {shown(dtype)} is unknown; known: {', '.join(NAMES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise WeightsError(f"{where}: shape {shown(shape)} must be a list of sizes")
    if not isinstance(pieces, list):
        raise WeightsError(f"{where}: pieces must be a list")
    return StoredTensor(NAMES[dtype], tuple(shape), tuple(_parse_piece(where, piece) for piece in pieces))


def _parse_piece(where: str, piece: Any) -> Piece:
    if not isinstance(piece, dict):
        raise WeightsError(f"{where}: a piece must have file and slice, this is {shown(piece)}")
    return Piece(plain_file_name(where, piece.get("file")), parse_slice(where, piece.get("slice")))


def parse_slice(where: str, ranges: Any) -> Slice:
    """A slice from JSON, `[[start, stop], …]`. `where` begins the message of the WeightsError."""
    if not isinstance(ranges, list) or not all(
        isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds) for bounds in ranges
    ):
        raise WeightsError(f"{where}: slice {shown(ranges)} must be a list of [start, stop]")
    return tuple((start, stop) for start, stop in ranges)


def plain_file_name(where: str, name: Any) -> str:
    """A file name that stays in its folder. `where` begins the message of the WeightsError."""
    if not isinstance(name, str) or name != Path(name).name or not name:
        raise WeightsError(f"{where}: file {shown(name)} must be the name of a file in the same folder")
    return name


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file that tells of weights.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def _object(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: {what} must be a JSON object")
    return value


def merge_pieces(folder: Path, found: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Put together what several files say of the same tensors: name -> tensor with all its pieces.

    Raises:
        WeightsError: two files disagree on a dtype or a shape, or the pieces of a tensor do not tile it.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, part in found:
        known = tensors.setdefault(name, StoredTensor(part.dtype, part.shape, ()))
        if (known.dtype, known.shape) != (part.dtype, part.shape):
            raise WeightsError(
                f"{folder}: {name}: {part.pieces[0].file} says {part.dtype} {list(part.shape)}, "
                f"{known.pieces[0].file} says {known.dtype} {list(known.shape)}"
            )
        tensors[name] = StoredTensor(known.dtype, known.shape, known.pieces + part.pieces)
    for name, tensor in tensors.items():
        check_tiling(f"{folder}: {name}", tensor)
    return tensors
