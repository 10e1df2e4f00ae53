"""Meta's own checkpoints of Llama: `params.json` and `consolidated.00.pth`, `consolidated.01.pth` … No torch in here.

Each file is what one of its model-parallel ranks holds. The tables of rotary embeddings that old files repeat are left out.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle, TensorRecord, entries
from megatron_core_impl.checkpoint.torch_archive import TorchArchive

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_TABLES = "rope.freqs"


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether files of these names make such a checkpoint."""
    return PARAMS in names and any(SHARD.fullmatch(name) for name in names)


def read_params(folder: Path) -> Mapping[str, Any]:
    """The content of params.json.

    Raises:
        RefusedPickle: it is no JSON object.
    """
    try:
        params = json.loads((folder / PARAMS).read_text())
    except (OSError, ValueError) as error:
        raise RefusedPickle(f"{folder / PARAMS}: cannot be read: {error}") from None
    if not isinstance(params, dict):
        raise RefusedPickle(f"{folder / PARAMS}: is no JSON object")
    return params


def open_shards(folder: Path) -> list[tuple[TorchArchive, dict[str, TensorRecord]]]:
    """The files of a checkpoint in the order of the ranks, and their tensors by name. Reads no tensor.

    Raises:
        RefusedPickle: one is missing, damaged, or holds something else than tensors by name.
    """
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := SHARD.fullmatch(path.name)))
    if numbers != list(range(len(numbers))) or not numbers:
        raise RefusedPickle(f"{folder}: holds consolidated.NN.pth for NN = {', '.join(map(str, numbers))}: others are missing")
    shards = []
    for number in numbers:
        archive = TorchArchive(folder / f"consolidated.{number:02d}.pth")
        try:
            content = entries(archive.content, "its top")
            tensors = {name: value for name, value in content.items() if not name.endswith(_TABLES)}
            if strange := [name for name, value in tensors.items() if not isinstance(value, TensorRecord)]:
                raise RefusedPickle(f"holds {strange[0]}, which is no tensor")
        except RefusedPickle as error:
            raise RefusedPickle(f"{archive.path}: {error}") from None
        shards.append((archive, tensors))
    return shards
