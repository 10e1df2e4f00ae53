"""Which files make a model, and what they say of it; no matter whether they lie in a folder or on the Hub.

Only what is needed is taken: `config.json`, the tokenizer's files, safetensors, and the licence and card. Pickled weights are
taken when asked for, and become safetensors.
"""

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, get_args

from megatron_core_impl.checkpoint import dtypes
from megatron_core_impl.models import families
from megatron_core_impl.shown import shown
from stages.contracts.config import Dtype
from stages.outcomes import BadInput

CONFIG = "config.json"
TOKENIZER_FILES = {
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
LICENCE_FILES = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
OTHER_FILES = re.compile(rf"generation_config\.json|README\.md|{LICENCE_FILES.pattern}", re.IGNORECASE)
SAFE, PICKLED = ("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)", re.IGNORECASE)
COPY_BYTES = 1 << 30


def wanted(names: set[str], read: Callable[[str], dict[str, Any]], where: str, allow_pickle: bool) -> list[str]:
    """The files that make the model, out of the names of those that a folder or repo has at its top.

    Raises:
        BadInput: the configuration, tokenizer or weights are missing, not supported, or pickled and that is not allowed.
    """

    def parsed(name: str) -> dict[str, Any]:
        try:
            return read(name)
        except ValueError as error:
            raise BadInput(f"model.source: {error}") from None

    if CONFIG not in names:
        raise BadInput(f"model.source: {where} has no {CONFIG}, so it is no Hugging Face model. It holds: {listed(names)}")
    try:
        families.config_from_hf(parsed(CONFIG))
    except ValueError as error:
        raise BadInput(f"model.source: {where}: {error}") from None
    if not names & {"tokenizer.model", "tokenizer.json"}:
        raise BadInput(f"model.source: {where} has no tokenizer: tokenizer.model or tokenizer.json must lie beside {CONFIG}")
    chosen = sorted(name for name in names if name in TOKENIZER_FILES or name == CONFIG or OTHER_FILES.fullmatch(name))
    for single, index in (SAFE, PICKLED) if allow_pickle else (SAFE,):
        if single in names:
            return [*chosen, single]
        if index in names:
            parts = _parts(parsed(index).get("weight_map"), f"model.source: {index} of {where}")
            if missing := parts - names:
                raise BadInput(f"model.source: {where} is incomplete: {index} names {listed(missing)}, which it does not have")
            return [*chosen, index, *sorted(parts)]
    if pickles := {name for name in names if PICKLES.fullmatch(name)}:
        raise BadInput(
            f"model.source: {where} has pickled weights only ({listed(pickles)}), and reading a pickle can run code. Choose a "
            "revision or a model with safetensors, or, if you trust its author, set model.allow_pickle: true"
            + ("; that reads pytorch_model.bin or its index" if allow_pickle else "")
        )
    raise BadInput(f"model.source: {where} has no weights, neither {SAFE[0]} nor {SAFE[1]}. It holds: {listed(names)}")


def _parts(weight_map: Any, where: str) -> set[str]:
    """The files that an index names."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{where} has no weight_map, or an empty one: it must say which file each tensor is in")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name:
            raise BadInput(f"{where}: weight_map has {shown(name)} for {shown(tensor)}, which is no name of a file beside it")
    return set(weight_map.values())


def unpickle(files: Path, where: str) -> None:
    """Turn pickled weights into safetensors, one file in memory at a time (mapped, where torch can).

    Args:
        where: they came from, for messages.

    Raises:
        BadInput: a file holds anything but tensors by name, or is damaged.
    """
    pickles = sorted(files.glob("*.bin"))
    if not pickles:
        return
    from megatron_core_impl.checkpoint.pickled import PickledReader
    from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter, WeightsError

    weight_map: dict[str, str] = {}
    for path in pickles:
        safe = path.with_name(path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors"))
        try:
            pickled = PickledReader(path)
            entries = [(name, dtype, shape) for name, (dtype, shape) in pickled.tensors.items()]
            with SafetensorsWriter(safe, entries, {"format": "pt"}) as writer:
                for name in writer.names:
                    writer.write(name, pickled.read(name))
                    weight_map[name] = safe.name
        except WeightsError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise BadInput(f"model.source: {path.name} of {where} is refused: {reason}") from None
        path.unlink()
    if (files / PICKLED[1]).exists():
        (files / PICKLED[1]).unlink()
        (files / SAFE[1]).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n")


def most_common_dtype(stored: Mapping[str, tuple[dtypes.Dtype, tuple[int, ...]]]) -> Dtype:
    """The precision in which most of the weights are stored.

    Raises:
        BadInput: it is not supported.
    """
    numbers = Counter[str]()
    for dtype, shape in stored.values():
        numbers[dtype.name] += prod(shape)
    most = max(numbers, key=lambda name: numbers[name], default="nothing")
    supported: tuple[Dtype, ...] = get_args(Dtype)
    for dtype_name in supported:
        if dtype_name == most:
            return dtype_name
    raise BadInput(f"model.source: its weights are stored as {most}; supported: {', '.join(supported)}")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, as a reflink where the file system has them: then it takes neither time nor room.

    No hard link: what is later written into one of the two files must not change the other.
    """
    with source.open("rb") as read, target.open("wb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), COPY_BYTES):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(read, write)


def listed(names: Collection[str]) -> str:
    """At most ten names."""
    shown = sorted(names)[:10]
    return ", ".join(shown) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "") if shown else "nothing"
