"""PyTorch's files (`.pt`), written tensor by tensor: what `torch.save` would write, without holding all of it.

See `torch_archive` for the format. Pickled are names of torch's own and what the caller gives besides tensors. This is for
Megatron-LLM, which reads nothing else; nothing of ours is ever stored so.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.restricted_pickle import STORAGES

_ALIGNMENT = 64  # of the numbers in the file, as torch.save has it: so they can be mapped into memory
_HEADER_BYTES = 30  # of a member of a ZIP archive, before its name
_ZIP64_BYTES = 20  # more where it is large
_LARGE = 1 << 30
_STORAGES = {getattr(torch, dtype): name for name, dtype in STORAGES.items()}


@dataclass(frozen=True)
class TensorToCome:
    """A place in the content of a file for a tensor that is written later."""

    name: str  # what its numbers are asked for by
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_torch_file(path: Path, content: Any, numbers: Callable[[str], Iterator[Tensor]]) -> None:
    """Write a file.

    Args:
        path: the file to make. Its name without the suffix is that of the folder inside the archive.
        content: what `torch.load` will give, with `TensorToCome`s for tensors.
        numbers: gives a tensor by name, in blocks of rows.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(zipfile.ZipInfo(f"{path.stem}/data.pkl"), pickled.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{path.stem}/byteorder"), "little")
        for key, tensor in enumerate(pickler.tensors):
            _write(archive, f"{path.stem}/data/{key}", tensor, numbers(tensor.name))
        archive.writestr(zipfile.ZipInfo(f"{path.stem}/version"), "3\n")


def _write(archive: zipfile.ZipFile, name: str, tensor: TensorToCome, blocks: Iterator[Tensor]) -> None:
    member, left = zipfile.ZipInfo(name), math.prod(tensor.shape) * tensor.dtype.itemsize
    is_large = left >= _LARGE
    assert archive.fp is not None
    begin = archive.fp.tell() + _HEADER_BYTES + len(name) + 4 + (_ZIP64_BYTES if is_large else 0)
    padding = -begin % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    member.file_size = left
    with archive.open(member, "w", force_zip64=is_large) as file:
        for block in blocks:
            if block.dtype != tensor.dtype:
                raise ValueError(f"{archive.filename}: {tensor.name}: {block.dtype} numbers for a tensor of {tensor.dtype}")
            data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
            left -= len(data)
            file.write(data)
    if left:
        raise ValueError(f"{archive.filename}: {tensor.name}: {left:,} bytes of it were not given")


class _Storage:
    def __init__(self, key: int, dtype: torch.dtype, size: int) -> None:
        self.key, self.dtype, self.size = key, dtype, size


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch.save does: a call that makes one of a storage, which is named and lies elsewhere."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[TensorToCome] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", getattr(torch, _STORAGES[value.dtype]), str(value.key), "cpu", value.size)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorToCome):
            return NotImplemented
        storage = _Storage(len(self.tensors), value.dtype, math.prod(value.shape))
        self.tensors.append(value)
        strides = tuple(math.prod(value.shape[dim + 1 :]) for dim in range(len(value.shape)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, strides, False, OrderedDict())
