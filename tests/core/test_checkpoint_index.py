"""Folders of our own weights that are damaged: each is refused, and the message names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from megatron_core_impl.checkpoint.index import INDEX_FILE
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import (
    open_weights,
    write_index,
    write_rank_file,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """w [4, 6] in two column pieces, one per file."""
    tensor = torch.arange(24.0).reshape(4, 6)
    write_rank_file(tmp_path, 0, [("w", (4, 6), ((0, 4), (0, 2)), tensor[:, :2])])
    write_rank_file(tmp_path, 1, [("w", (4, 6), ((0, 4), (2, 6)), tensor[:, 2:])])
    write_index(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_missing_shard_file(folder: Path) -> None:
    (folder / "rank-0001.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"rank-0001\.safetensors: missing, and index\.json needs it"):
        open_weights(folder)


def test_truncated_shard_file(folder: Path) -> None:
    path = folder / "rank-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"rank-0001\.safetensors: is truncated: has 223 bytes, index\.json says 224"):
        open_weights(folder).read("w")


def test_tensor_that_is_not_there(folder: Path) -> None:
    reader = open_weights(folder)
    for ask in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(WeightsError, match=r"holds no tensor v \(of 1 tensors in all\)"):
            ask("v")


def test_slice_that_is_not_in_the_tensor(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"w: has shape \[4, 6\], so there is no slice \[0:5, 0:6\] of it"):
        open_weights(folder).read("w", ((0, 5), (0, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["pieces"].pop(), "hold 8 of the 24 numbers"),
        (lambda w: w["pieces"].append(w["pieces"][0]), r"pieces overlap: \[0:4, 0:2\] in rank-0000"),
        (lambda w: w["pieces"][0].update(file="../rank-0000.safetensors"), "must be the name of a file in the same folder"),
        (lambda w: w["pieces"][0].update(file=None), "must be the name of a file in the same folder"),
        (lambda w: w["pieces"][0].update(slice=[[0, 4], [0]]), r"must be a list of \[start, stop\]"),
        (lambda w: w["pieces"][0].update(slice=[[-1, 4], [0, 2]]), r"no slice \[-1:4, 0:2\]"),
        (lambda w: w.update(shape="4, 6"), "shape '4, 6' must be a list of sizes"),
        (lambda w: w.update(dtype="int3"), "dtype 'int3' is unknown; known: float64, float32"),
        (lambda w: w.update(pieces={}), "pieces must be a list"),
        (lambda w: w.update(pieces=[3]), "a piece must have file and slice"),
    ],
)
def test_index_that_makes_no_sense(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(folder, lambda index: change(index["tensors"]["w"]))
    with pytest.raises(WeightsError, match=message) as caught:
        open_weights(folder)
    assert str(caught.value).startswith(f"{folder / INDEX_FILE}: w: ")


def test_index_has_the_digest_of_every_file(folder: Path) -> None:
    files = json.loads((folder / INDEX_FILE).read_text())["files"]
    assert files == {
        path.name: {"size": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("files"), "files must be an object of sizes and digests"),
        (lambda index: index["files"].pop("rank-0001.safetensors"), r"w: a piece lies in rank-0001\.safetensors, which has no"),
        (
            lambda index: index["files"]["rank-0001.safetensors"].pop("blake3"),
            r"rank-0001\.safetensors: must have a size and a b",
        ),
        (
            lambda index: index["files"]["rank-0001.safetensors"].update(size=-1),
            r"rank-0001\.safetensors: must have a size and",
        ),
        (lambda index: index["files"].update({"../x": {}}), "'../x' must be the name of a file in the same folder"),
        (lambda index: index.update(version=1), "version 1; this reads 'megatron-flows weights', version 3"),
    ],
)
def test_index_without_its_digests(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(folder, change)
    with pytest.raises(WeightsError, match=message) as caught:
        open_weights(folder)
    assert str(caught.value).startswith(f"{folder / INDEX_FILE}: ")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": "other"}', '{"tensors": 3}'])
def test_index_that_is_none(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json: (not JSON|is no JSON object|is )"):
        open_weights(folder)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_index_that_lies_is_refused_before_memory_is_taken(folder: Path, dtype: torch.dtype | None) -> None:
    """It says petabytes; the files say otherwise."""

    def change(index: dict[str, Any]) -> None:
        index["tensors"]["w"]["shape"][0] = 1 << 50
        for piece in index["tensors"]["w"]["pieces"]:
            piece["slice"][0][1] = 1 << 50

    edit(folder, change)
    message = rf"rank-0000\.safetensors: w: the index says float32 \[{1 << 50}, 2\], the file holds float32 \[4, 2\]"
    with pytest.raises(WeightsError, match=message):
        open_weights(folder).read("w", dtype=dtype)
    edit(folder, lambda index: index["tensors"].update(v=index["tensors"].pop("w")))
    with pytest.raises(WeightsError, match=r"rank-0000\.safetensors: v: .* the file holds no such tensor"):
        open_weights(folder).read("v")
