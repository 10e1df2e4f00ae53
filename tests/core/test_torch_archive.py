"""PyTorch's files as archives: what is none, what is damaged, and what has no checksums."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.torch_archive import TorchArchive
from megatron_core_impl.checkpoint.torch_tensors import TorchTensors


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(RefusedPickle, match=r"model.pt: no such file"):
        TorchArchive(path)
    path.write_bytes(b"")
    with pytest.raises(RefusedPickle, match=r"model.pt: is no intact PyTorch file"):
        TorchArchive(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        RefusedPickle, match=r"is in PyTorch's format before 1\.6, which is not read.*save it again: torch\.save"
    ):
        TorchArchive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/readme", "")
    with pytest.raises(RefusedPickle, match=r"is no intact PyTorch file"):
        TorchArchive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(1, 2))
        archive.writestr("x/byteorder", "big")
    with pytest.raises(RefusedPickle, match=r"holds big-endian numbers, which are not supported"):
        TorchArchive(path)


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RefusedPickle, match=r"is no intact PyTorch file"):
        TorchArchive(path)
    path.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v1"))  # its checksum tells
    with pytest.raises(RefusedPickle, match=r"is no intact PyTorch file"):
        TorchArchive(path)
    for name, data in (("x/data/0", b"\x00" * 8), ("x/data/1", b"\x00" * 4000)):
        with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(content)) as old:
            archive.writestr("x/data.pkl", old.read("model/data.pkl"))
            archive.writestr(name, data)
        opened = TorchArchive(path)
        with pytest.raises(WeightsError, match=r"is damaged: storage 0 does not hold 4,000 bytes"):
            TorchTensors(opened, opened.content).read("a")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, zipfile.ZipFile(io.BytesIO(content)) as old:
        archive.writestr("x/data.pkl", old.read("model/data.pkl"))
        archive.writestr("x/data/0", b"\x00" * 4000)
    with pytest.raises(RefusedPickle, match=r"\(x/data.pkl in it is compressed or encrypted, which PyTorch never does\)"):
        TorchArchive(path)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    """In the first and in the last of a storage's, whatever part of it is asked for; each storage is compared once."""
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(400_000.0).view(-1, 2), "b": torch.ones(3), "turned": torch.zeros(5, 4).t()}, path)
    whole = path.read_bytes()
    archive = TorchArchive(path)
    file = TorchTensors(archive, archive.content)
    start = archive.place(archive.content["a"].storage)
    for at in (start, start + 1_599_999):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        archive = TorchArchive(path)
        damaged = TorchTensors(archive, archive.content)
        assert damaged.read("b").tolist() == [1, 1, 1]
        with pytest.raises(
            WeightsError,
            match=r"model.pt: a: model/data/0 is damaged: its CRC-32 is [0-9a-f]{8}, the archive's directory says [0-9a-f]{8}$",
        ):
            damaged.read("a", ((7, 8), (0, 2)))
    assert file.read("a", ((7, 8), (0, 2))).tolist() == [[14, 15]], "it was compared when it was whole"


def test_files_without_checksums(tmp_path: Path) -> None:
    """PyTorch leaves them out where it is told to. All are zero then; a file in which one is zero has been damaged."""
    path = tmp_path / "model.pt"
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(3.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    archive = TorchArchive(path)
    assert not archive.has_checksums
    assert TorchTensors(archive, archive.content).read("a").tolist() == [0, 1, 2]
    torch.save({"a": torch.arange(3.0)}, path)
    (crc,) = (member.CRC for member in zipfile.ZipFile(path).infolist() if member.filename == "model/data/0")
    path.write_bytes(path.read_bytes().replace(crc.to_bytes(4, "little"), bytes(4)))
    archive = TorchArchive(path)
    with pytest.raises(WeightsError, match=r"model.pt: a: model/data/0 is damaged: its CRC-32 is .* says 00000000"):
        TorchTensors(archive, archive.content).read("a")
