"""PyTorch files written tensor by tensor: PyTorch itself reads them."""

import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_core_impl.checkpoint import torch_writer
from megatron_core_impl.checkpoint.restricted_pickle import TensorRecord
from megatron_core_impl.checkpoint.torch_archive import TorchArchive
from megatron_core_impl.checkpoint.torch_tensors import TorchTensors
from megatron_core_impl.checkpoint.torch_writer import TensorToCome, write_torch_file

TENSORS = {
    "a": torch.arange(12.0).view(3, 4), "b": torch.arange(5).to(torch.bfloat16), "c": torch.ones(2, 1, dtype=torch.float16),
    "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3),
}  # fmt: skip


def to_come(name: str) -> TensorToCome:
    return TensorToCome(name, TENSORS[name].dtype, tuple(TENSORS[name].shape))


def by_rows(name: str) -> Any:
    tensor = TENSORS[name]
    return iter([tensor] if tensor.dim() == 0 else tensor.split(1))


@pytest.mark.parametrize("large", [1 << 30, 1])
def test_pytorch_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(torch_writer, "_LARGE", large)  # 1: as members of more than 2 GiB are written
    path = tmp_path / "model_optim_rng.pt"
    args = Namespace(a=1, dtype=torch.float32)
    content = {"args": args, "model": OrderedDict((name, to_come(name)) for name in TENSORS), "iteration": "release"}
    write_torch_file(path, content, by_rows)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "checksums"
    for mmap in (False, True):
        read = torch.load(path, weights_only=False, mmap=mmap)
        assert (read["args"], read["iteration"]) == (args, "release")
        assert type(read["model"]) is OrderedDict
        for name, tensor in TENSORS.items():
            assert read["model"][name].dtype == tensor.dtype
            assert torch.equal(read["model"][name], tensor)
            assert read["model"][name].numel() == 0 or read["model"][name].data_ptr() % 64 == 0 or not mmap
    ours = TorchArchive(path)
    file = TorchTensors(ours, ours.content["model"])
    assert all(torch.equal(file.read(name), tensor) for name, tensor in TENSORS.items())


def test_the_same_pickle_as_torch_save(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    write_torch_file(tmp_path / "x.pt", {name: to_come(name) for name in names}, by_rows)
    torch.save({name: TENSORS[name] for name in names}, tmp_path / "y.pt")
    ours, theirs = TorchArchive(tmp_path / "x.pt"), TorchArchive(tmp_path / "y.pt")
    assert ours.content == theirs.content
    assert all(isinstance(record, TensorRecord) for record in ours.content.values())


def test_memory_holds_a_block(tmp_path: Path) -> None:
    alive = 0

    class Block(Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def numbers(name: str) -> Any:
        nonlocal alive
        for row in torch.zeros(64, 8).split(1):
            assert alive <= 1
            alive += 1
            yield row.as_subclass(Block)

    write_torch_file(tmp_path / "x.pt", {"a": TensorToCome("a", torch.float32, (64, 8))}, numbers)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    entry = {"a": to_come("a")}
    with pytest.raises(ValueError, match=r"x.pt: a: 16 bytes of it were not given"):
        write_torch_file(tmp_path / "x.pt", entry, lambda name: iter(TENSORS["a"][:2].split(1)))
    with pytest.raises(ValueError, match=r"x.pt: a: torch.float64 numbers for a tensor of torch.float32"):
        write_torch_file(tmp_path / "x.pt", entry, lambda name: iter([TENSORS["a"].double()]))
