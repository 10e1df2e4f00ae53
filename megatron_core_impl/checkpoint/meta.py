"""Meta's own checkpoints of Llama: `params.json` and `consolidated.00.pth`, `consolidated.01.pth` … No torch in here.

Each file is what one of its model-parallel ranks holds. The tables of rotary embeddings that old files repeat are left out.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle, TensorRecord, entries
from megatron_core_impl.checkpoint.torch_archive import TorchArchive
from megatron_core_impl.json_files import read_json

PARAMS, CHECKLIST = "params.json", "checklist.chk"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_LISTED = re.compile(r"([0-9a-fA-F]{32}) [ *]?(\S+)\s*")
_TABLES = "rope.freqs"


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether files of these names make such a checkpoint."""
    return PARAMS in names and any(SHARD.fullmatch(name) for name in names)


def read_params(folder: Path) -> Mapping[str, Any]:
    """The content of params.json.

    Raises:
        ValueError: it is no JSON object.
    """
    return read_json(folder / PARAMS)


def check_listed(folder: Path, progress: Callable[[int, int, str], None]) -> None:
    """Compare the files with the MD5 digests that Meta's checklist.chk lists, where it lies beside them.

    Args:
        progress: told bytes done and bytes in all.

    Raises:
        RefusedPickle: a file is missing, or is another one; the message says which.
    """
    checklist = folder / CHECKLIST
    if not checklist.is_file():
        return
    listed = {}
    for number, line in enumerate(checklist.read_text(errors="replace").splitlines(), start=1):
        if (found := _LISTED.fullmatch(line)) is None:
            raise RefusedPickle(f"{checklist}: line {number} is no MD5 digest and name of a file")
        if SHARD.fullmatch(found[2]) or found[2] == PARAMS:  # others, such as the tokenizer's, are of no concern here
            listed[folder / found[2]] = found[1].lower()
    if missing := [path for path in listed if not path.is_file()]:
        raise RefusedPickle(f"{missing[0]}: missing, and {CHECKLIST} lists it")
    total, done = sum(path.stat().st_size for path in listed), 0
    for path, expected in listed.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if digest != expected:
            raise RefusedPickle(
                f"{path}: is not the file that {CHECKLIST} lists: its MD5 is {digest}, not {expected}. If it was changed on "
                "purpose, remove its line there"
            )
        done += path.stat().st_size
        progress(done, total, f"comparing {path.name} with {CHECKLIST}")


def open_shards(folder: Path) -> list[tuple[TorchArchive, dict[str, TensorRecord]]]:
    """The files of a checkpoint in the order of the ranks, and their tensors by name. Reads no tensor.

    Raises:
        RefusedPickle: one is missing, damaged, or holds something else than tensors by name.
    """
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := SHARD.fullmatch(path.name)))
    if numbers != list(range(len(numbers))) or not numbers:
        held = ", ".join(f"{number:02d}" for number in numbers)
        raise RefusedPickle(f"{folder}: holds consolidated.NN.pth for NN = {held}: others are missing")
    shards = []
    for number in numbers:
        archive = TorchArchive(folder / f"consolidated.{number:02d}.pth")
        try:
            content = entries(archive.content, "its top")
            tensors = {name: value for name, value in content.items() if not name.endswith(_TABLES)}
            if strange := [name for name, value in tensors.items() if not isinstance(value, TensorRecord)]:
                raise RefusedPickle(f"holds {strange[0][:100]}, which is no tensor")
        except RefusedPickle as error:
            raise RefusedPickle(f"{archive.path}: {error}") from None
        shards.append((archive, tensors))
    return shards
