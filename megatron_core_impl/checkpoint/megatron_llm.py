"""Checkpoints of Megatron-LLM: which files there are, and what each rank's holds, under one dialect of names. No torch in here.

    ROOT/latest_checkpointed_iteration.txt       "release", or the number of an iteration
    ROOT/release/… or ROOT/iter_0000100/…
        mp_rank_00/model_optim_rng.pt            tp rank, without pipeline parallelism
        mp_rank_00_001/model_optim_rng.pt        tp rank and pp rank; model_rng.pt with its distributed optimizer

A file holds `args`, `checkpoint_version`, `iteration`, `model` (`model0`, `model1` … with an interleaved pipeline), and, where
training wrote it, the states of the optimizer and of random number generators, which are not read. Its converter names tensors
otherwise than its training does; here they have the names of its training. Layers count from 0 in every file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle, TensorRecord, entries
from megatron_core_impl.checkpoint.torch_archive import TorchArchive
from megatron_core_impl.config import Layout
from megatron_core_impl.shown import shown

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE, VERSION = "release", 3.0
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
EMBEDDING, EMBEDDING_FOR_HEAD = "embedding.word_embeddings.weight", "word_embeddings_for_head.weight"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")


@dataclass(frozen=True)
class RankFile:
    """What one file stores of a chunk of layers: which rank and chunk, and its tensors by name."""

    archive: TorchArchive
    tp_rank: int
    pp_rank: int
    chunk: int
    tensors: Mapping[str, TensorRecord]

    @property
    def name(self) -> str:
        """Of the file and the chunk, below the folder of the iteration."""
        chunk = f" (model{self.chunk})" if self.chunk else ""
        return f"{self.archive.path.parent.name}/{self.archive.path.name}{chunk}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: the arguments it was written with, and its files."""

    folder: Path  # of the iteration
    args: Mapping[str, Any]
    layout: Layout
    files: tuple[RankFile, ...]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of Megatron-LLM's: that of all iterations, or of one."""
    return (folder / TRACKER).is_file() or any(_RANK.fullmatch(path.name) for path in folder.glob("mp_rank_*"))


def iteration_folder(folder: Path) -> Path:
    """The folder of the iteration that a checkpoint means: itself, or the latest.

    Raises:
        RefusedPickle: it does not say which, or that is not there.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    latest = tracker.read_text(errors="replace").strip()
    if latest != RELEASE and not latest.isdecimal():
        raise RefusedPickle(f"{tracker}: says {shown(latest)}; it must be {RELEASE} or the number of an iteration")
    found = folder / (latest if latest == RELEASE else f"iter_{int(latest):07d}")
    if not found.is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise RefusedPickle(f"{tracker}: says {latest}, and there is no {found.name}. There is: {there}")
    return found


def read_args(folder: Path) -> Mapping[str, Any]:
    """The arguments that a checkpoint was written with, from the file of its first rank.

    Raises:
        RefusedPickle: it lacks that file, or the file holds something else.
    """
    path = next(iter(_rank_files(iteration_folder(folder)).values()))
    return _args(TorchArchive(path))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of a folder. Opens every file, and reads no tensor.

    Raises:
        RefusedPickle: a file is missing, damaged, of another layout than the arguments say, or holds what no checkpoint needs.
    """
    folder = iteration_folder(folder)
    paths = _rank_files(folder)
    archives = {rank: TorchArchive(path) for rank, path in paths.items()}
    args = _args(next(iter(archives.values())))
    layout = _layout(folder, args)
    expected = {(pp, tp) for pp in range(layout.pp) for tp in range(layout.tp)}
    if archives.keys() != expected:
        raise RefusedPickle(
            f"{folder}: its arguments say {layout.tp} tensor and {layout.pp} pipeline parallel ranks, and it holds the files "
            f"of {', '.join(sorted(path.parent.name for path in paths.values()))}"
        )
    files = tuple(
        RankFile(archives[pp_rank, tp_rank], tp_rank, pp_rank, chunk, tensors)
        for pp_rank, tp_rank in sorted(expected)
        for chunk, tensors in enumerate(_models(archives[pp_rank, tp_rank], layout.vpp))
    )
    _check_sizes(folder, args, files)
    return Checkpoint(folder, args, layout, files)


def rank_path(root: Path, layout: Layout, pp_rank: int, tp_rank: int) -> Path:
    """Where the file of a rank of a released checkpoint lies."""
    rank = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if layout.pp > 1 else "")
    return root / RELEASE / rank / MODEL_FILES[0]


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name as its files nest them: what `_flat` undoes. Of the head, whose name has no module, the tensor alone."""
    model: dict[str, Any] = {"language_model": {}}
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".")
        if name == EMBEDDING_FOR_HEAD:
            model["word_embeddings_for_head"] = {"weight": tensor}
        elif not rest:
            model["language_model"][module] = tensor
        elif name == EMBEDDING:
            model["language_model"][module] = {"word_embeddings": {"weight": tensor}}
        else:
            model["language_model"].setdefault(module, {})[rest] = tensor
    return model


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each (pp rank, tp rank), by their order."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if (rank := _RANK.fullmatch(path.name)) is None:
            continue  # of its distributed optimizer: one more rank
        files = [path / name for name in MODEL_FILES if (path / name).is_file()]
        if not files:
            raise RefusedPickle(f"{path}: has no {MODEL_FILES[0]}")
        found[int(rank[2] or 0), int(rank[1])] = files[0]
    if not found:
        raise RefusedPickle(f"{folder}: has no mp_rank_00/{MODEL_FILES[0]}, so it holds no checkpoint of Megatron-LLM")
    return dict(sorted(found.items()))


def _args(archive: TorchArchive) -> Mapping[str, Any]:
    try:
        state = entries(archive.content, "its top")
        args = entries(state.get("args"), "args")
    except RefusedPickle as error:
        raise RefusedPickle(f"{archive.path}: {error}, so it is no checkpoint of Megatron-LLM") from None
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < VERSION:
        raise RefusedPickle(
            f"{archive.path}: checkpoint_version={shown(version)} is not supported; 3.0 is, which orders q, k and v by head"
        )
    return args


def _layout(folder: Path, args: Mapping[str, Any]) -> Layout:
    sizes = {}
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        sizes[name] = args.get(name, 1)
        if type(sizes[name]) is not int or not 1 <= sizes[name] <= 100_000:
            raise RefusedPickle(f"{folder}: args.{name}={shown(sizes[name])} is no number of ranks")
    tp, pp = sizes.values()
    per_stage, layers = args.get("num_layers_per_virtual_pipeline_stage"), args.get("num_layers")
    if per_stage is None or pp == 1:
        return Layout(tp=tp, pp=pp)
    if type(per_stage) is not int or type(layers) is not int or per_stage < 1 or layers % (pp * per_stage):
        raise RefusedPickle(
            f"{folder}: args.num_layers_per_virtual_pipeline_stage={shown(per_stage)} does not share out "
            f"num_layers={shown(layers)}"
        )
    return Layout(tp=tp, pp=pp, vpp=layers // (pp * per_stage))


def _check_sizes(folder: Path, args: Mapping[str, Any], files: Iterable[RankFile]) -> None:
    """Refuse sizes that the files contradict: before anything is built that is as large as they say."""
    layers, width = 0, None
    for file in files:
        if file.tp_rank == 0:
            layers += len({found[1] for name in file.tensors if (found := _LAYER.match(name))})
        if EMBEDDING in file.tensors and len(shape := file.tensors[EMBEDDING].shape) == 2:
            width = shape[1]
    for name, stored in (("num_layers", layers), ("hidden_size", width)):
        if stored is not None and type(args.get(name)) is int and args[name] != stored:
            raise RefusedPickle(f"{folder}: args.{name}={shown(args[name])}, and its files hold {stored:,}")


def _models(archive: TorchArchive, chunks: int) -> Iterator[dict[str, TensorRecord]]:
    for name in ("model",) if chunks == 1 else (f"model{chunk}" for chunk in range(chunks)):
        try:
            yield _flat(entries(archive.content.get(name), name))
        except RefusedPickle as error:
            raise RefusedPickle(f"{archive.path}: {error}") from None


def _flat(model: Mapping[str, Any]) -> dict[str, TensorRecord]:
    """The tensors of a model by name, in the dialect of training, whichever the file has."""
    tensors: dict[str, TensorRecord] = {}

    def take(name: str, value: Any) -> None:
        if not isinstance(value, TensorRecord):
            raise RefusedPickle(f"has no tensor at {name[:100]}")
        if name in tensors:
            raise RefusedPickle(f"has the tensor {name[:100]} twice")
        tensors[name] = value

    language_model = entries(model.get("language_model"), "language_model")
    if "word_embeddings_for_head" in model:
        take(EMBEDDING_FOR_HEAD, entries(model["word_embeddings_for_head"], "word_embeddings_for_head").get("weight"))
    for key, value in language_model.items():
        if key == "embedding":
            words = entries(value, key)
            inner = words.get("word_embeddings")
            take(EMBEDDING, words.get("word_embeddings.weight") if inner is None else entries(inner, key).get("weight"))
        elif key in ("transformer", "encoder"):
            for name, tensor in entries(value, key).items():
                take(f"encoder.{name}".replace(".attention.", ".self_attention."), tensor)
        else:
            take(key, value)
    return tensors
