"""What a folder of weights holds, whatever its form, without reading a tensor: tensors and their pieces, layout, digests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_core_impl.checkpoint import megatron_llm, meta
from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.checkpoint.digests import INDEX_FILE, FileDigest, parse_digests
from megatron_core_impl.checkpoint.dtypes import dtype_of
from megatron_core_impl.checkpoint.index import read_index_file
from megatron_core_impl.checkpoint.restricted_pickle import TensorRecord
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.slicing import Slice
from stages.contracts import artifacts as a

AXES = ("tp", "pp", "dp", "vpp")


class Stored(NamedTuple):
    """A tensor as a folder stores it: whole in one file, or in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, Slice | None], ...]  # file and slice; None where the form does not tell which

    @property
    def numbers(self) -> int:
        return prod(self.shape)


class Recorded(NamedTuple):
    """What some file says of another one."""

    file: str
    digest: FileDigest
    by: str


@dataclass(frozen=True)
class Contents:
    """A folder of weights."""

    folder: Path
    form: str
    layout: dict[str, int]
    step: int | None
    tensors: tuple[Stored, ...]
    itemsizes: dict[str, int]  # of the dtypes that occur
    files: dict[str, int]  # name -> bytes, of those that hold tensors
    recorded: tuple[Recorded, ...]

    @property
    def bytes(self) -> int:
        """Of the numbers."""
        return sum(tensor.numbers * self.itemsizes[tensor.dtype] for tensor in self.tensors)


def locate(path: Path) -> tuple[Path, a.Artifact | None]:
    """The folder of weights that a path means, and the stage's result that it belongs to.

    A result stands for its weights, a folder of training checkpoints for its newest.

    Raises:
        ValueError: there is nothing, or the result of a stage that makes no weights.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: is a file; name the folder that it lies in" if path.exists() else f"{path}: no such folder")
    if (path / a.ARTIFACT_FILE).is_file():
        artifact = a.load_artifact(path)
        match artifact:
            case a.WeightsArtifact():
                return path, artifact
            case a.CheckpointArtifact():
                return path / artifact.checkpoint, artifact
            case a.ModelArtifact():
                return path / "files", artifact
            case a.ExportArtifact():
                return path / "model", artifact
        raise ValueError(f"{path}: is the result of {artifact.stage}, which has no weights in it")
    for root in (path, path / "checkpoints"):
        if steps := checkpoints.finished_steps(root):
            return checkpoints.step_folder(root, steps[0]), None
    return path, None


def contents_of(path: Path) -> Contents:
    """What a folder of weights holds, in any form: ours, Hugging Face's, Megatron-LLM's, Meta's.

    Raises:
        ValueError: there are no weights, or what describes them is damaged; the message names the file.
    """
    folder, _ = locate(path)
    if megatron_llm.is_checkpoint(folder):
        return _of_megatron_llm(folder)
    if meta.is_checkpoint([file.name for file in folder.iterdir()]):
        return _of_meta(folder)
    reader = open_weights(folder, allow_pickle=True)  # its tensors are not read, and code in it is never run
    reader.check_headers()
    tensors = tuple(
        Stored(
            name, stored.dtype.name, stored.shape,
            tuple((piece.file, piece.slice) for piece in stored.pieces),
        )
        for name, stored in reader.index.tensors.items()
    )  # fmt: skip
    is_ours = (folder / INDEX_FILE).is_file()
    layout = {axis: reader.extra["layout"].get(axis, 1) for axis in AXES} if "layout" in reader.extra else {}
    return Contents(
        folder=folder,
        form=_form(folder, layout) if is_ours else "Hugging Face folder",
        layout=layout,
        step=reader.extra.get("step"),
        tensors=tensors,
        itemsizes={stored.dtype.name: stored.dtype.itemsize for stored in reader.index.tensors.values()},
        files=_sizes(folder, tensors),
        recorded=recorded_of(path),
    )


def _form(folder: Path, layout: dict[str, int]) -> str:
    if (folder / checkpoints.STATE_FILE).is_file():
        return "training checkpoint"
    return "canonical weights" if all(size == 1 for size in layout.values()) else "sharded weights"


def recorded_of(path: Path) -> tuple[Recorded, ...]:
    """Everything that is recorded of the files of a folder of weights; nothing where its form has no digests.

    Raises:
        ValueError: there is no such folder, or what records it is damaged.
    """
    return tuple(_records(path, *locate(path)))


def _records(path: Path, folder: Path, artifact: a.Artifact | None) -> Iterator[Recorded]:
    """By the index, of the index by the state, by the artifact."""
    if (folder / INDEX_FILE).is_file():
        for name, digest in read_index_file(folder / INDEX_FILE).files.items():
            yield Recorded(name, digest, INDEX_FILE)
    if checkpoints.is_checkpoint(folder):
        state = checkpoints.read_state(folder)
        recorded = parse_digests({INDEX_FILE: state["index"]})
        yield Recorded(INDEX_FILE, recorded[INDEX_FILE], checkpoints.STATE_FILE)
    if artifact is not None:
        for name, record in artifact.files.items():
            if (path / name).parent == folder:
                yield Recorded((path / name).name, FileDigest(record.size, record.blake3), a.ARTIFACT_FILE)


def _of_megatron_llm(folder: Path) -> Contents:
    checkpoint = megatron_llm.open_checkpoint(folder)
    found = [(file.name, name, record) for file in checkpoint.files for name, record in file.tensors.items()]
    iteration = checkpoint.folder.name.removeprefix("iter_")
    return _of_records(
        checkpoint.folder,
        "Megatron-LLM checkpoint",
        {axis: getattr(checkpoint.layout, axis) for axis in AXES},
        int(iteration) if iteration.isdigit() else None,
        found,
    )


def _of_meta(folder: Path) -> Contents:
    shards = meta.open_shards(folder)
    found = [(archive.path.name, name, record) for archive, tensors in shards for name, record in tensors.items()]
    return _of_records(folder, "Meta's checkpoint", {"tp": len(shards)}, None, found)


def _of_records(
    folder: Path, form: str, layout: dict[str, int], step: int | None, found: Iterable[tuple[str, str, TensorRecord]]
) -> Contents:
    """Contents of files of PyTorch: (file, name, tensor). They store parts of tensors and do not tell which."""
    files: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for file, name, record in found:
        files.setdefault((name, record.dtype, tuple(record.shape)), []).append(file)
    tensors = tuple(
        Stored(name, dtype, (len(where), *shape) if len(where) > 1 else shape, tuple((file, None) for file in where))
        for (name, dtype, shape), where in files.items()
    )
    itemsizes = {tensor.dtype: dtype_of(tensor.dtype).itemsize for tensor in tensors}
    return Contents(folder, form, layout, step, tensors, itemsizes, _sizes(folder, tensors), ())


def _sizes(folder: Path, tensors: Iterable[Stored]) -> dict[str, int]:
    names = {file.partition(" ")[0] for tensor in tensors for file, _ in tensor.pieces}
    return {name: (folder / name).stat().st_size for name in sorted(names)}
