"""Folders of Hugging Face as weights: safetensors, in one file and in several, and pickles where they are allowed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_core_impl.checkpoint.dtypes import dtype_of
from megatron_core_impl.checkpoint.pickled import PickledReader
from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.reshard import plan
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import (
    open_weights,
)
from megatron_core_impl.checkpoint.slicing import (
    Slice,
)
from megatron_core_impl.config import Layout
from megatron_core_impl.models import families

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm" / "llama2_gqa" / "hf"


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    """Some tensors, in two precisions."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (9, 6), "model.norm.weight": (6,), "lm_head.weight": (9, 6)}
    return {name: torch.randn(shape).to(torch.bfloat16 if len(shape) > 1 else torch.float32) for name, shape in shapes.items()}


def cut(tensor: Tensor, piece: Slice) -> Tensor:
    return tensor[tuple(slice(*bounds) for bounds in piece)].contiguous()


def split(folder: Path, model: dict[str, Tensor], save: Callable[[dict[str, Tensor], Path], None], name: str) -> None:
    """Two files and their index, as transformers writes them."""
    halves = [dict(list(model.items())[part::2]) for part in (0, 1)]
    stem, suffix = name.split(".")
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        file_name = f"{stem}-{number:05d}-of-00002.{suffix}"
        save(half, folder / file_name)
        weight_map |= dict.fromkeys(half, file_name)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_sharded_hugging_face_folder(tmp_path: Path, model: dict[str, Tensor]) -> None:
    split(tmp_path, model, save_file, "model.safetensors")
    reader = open_weights(tmp_path)
    assert set(reader.names) == set(model)
    assert all(same_bits(reader.read(name), tensor) for name, tensor in model.items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors: missing, and model\.safetensors\.index\.json"):
        open_weights(tmp_path)


def test_hugging_face_index_that_lies(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in [
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"one\.safetensors: holds no tensor b, which model\.safetensors\.i"),
        ({"a": "/etc/passwd"}, "a: file '/etc/passwd' must be the name of a file in the same folder"),
        ({}, "weight_map must map tensors to files"),
        ([1], "weight_map must map tensors to files"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=message):
            open_weights(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights: neither index\.json nor model\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
def test_golden_model() -> None:
    expected = load_file(GOLDEN / "model.safetensors")
    config = families.config_from_hf(json.loads((GOLDEN / "config.json").read_text()))
    reader = open_weights(GOLDEN)
    specs = families.tensors(config)
    assert {spec.name: spec.shape for spec in specs} == {name: tuple(t.shape) for name, t in expected.items()}
    for rank, pieces in enumerate(plan(specs, Layout(tp=2, pp=2))):
        assert pieces, rank
        assert all(same_bits(reader.read(name, piece), cut(expected[name], piece)) for name, piece in pieces.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("files", [1, 2])
def test_pickled_weights_only_where_allowed(tmp_path: Path, model: dict[str, Tensor], zipped: bool, files: int) -> None:
    def save(tensors: dict[str, Tensor], path: Path) -> None:
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)

    if files == 1:
        save(model, tmp_path / "pytorch_model.bin")
    else:
        split(tmp_path, model, save, "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"only pickled weights \(pytorch_model\S*\.bin\), .* set model\.allow_pickle: true"):
        open_weights(tmp_path)
    reader = open_weights(tmp_path, allow_pickle=True)
    assert set(reader.names) == set(model)
    assert all(same_bits(reader.read(name), tensor) for name, tensor in model.items())
    piece = ((3, 7), (2, 5))
    assert same_bits(reader.read("lm_head.weight", piece), cut(model["lm_head.weight"], piece))


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_pickle_that_carries_code_raises_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"w": Malicious()}, protocol=2))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: names getattr, which no file of tensors needs"):
        PickledReader(path)
    for content in (b"", b"nonsense", b"abc", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin: no PyTorch file of plain tensors"):
            PickledReader(path)
    torch.save({"w": os.system}, path)
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin: names posix\.system, which no file of tensors needs. Nothing in it was run$"
    ):
        open_weights(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save({"w": torch.zeros(2), "epoch": 3}, path)
    with pytest.raises(WeightsError, match="must hold tensors by name and nothing else"):
        PickledReader(path)


def test_a_flipped_byte_in_a_pickled_file_is_found(tmp_path: Path) -> None:
    """PyTorch does not look. Wherever it lies, before anything is read."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000), "b": torch.zeros(3)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert PickledReader(path).tensors["b"] == (dtype_of("float32"), (3,)), "what is in it is told without reading it"
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin: pytorch_model/data/0 is damaged: its CRC-32 is [0-9a-f]{8}, the"
    ):
        PickledReader(path).read("b")
