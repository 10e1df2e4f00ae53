"""Pickled PyTorch weights (`pytorch_model*.bin`), read only where a person allowed it. Nothing here ever writes a pickle."""

import re
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype, as_bytes, dtype_of
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.slicing import Slice, whole
from megatron_core_impl.checkpoint.source import TensorFile
from megatron_core_impl.checkpoint.stored_zip import StoredZip

_GLOBAL = re.compile(r"\bGLOBAL ([\w.]{1,200})")  # in what PyTorch says of a name that it refuses


class PickledReader(TensorFile):
    """A `.bin` file of tensors by slices, mapped into memory: pages are read when they are needed.

    `weights_only` admits tensors and plain containers, so a file that carries code raises and runs nothing. Before the first
    tensor is read, the bytes of all of them are compared with the checksums in the file, which PyTorch leaves alone. The format
    before PyTorch 1.6 has none.

    Raises:
        WeightsError: it is no such file, or holds something else than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        state = _load(path)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(f"{path}: must hold tensors by name and nothing else")
        self._state: dict[str, Tensor] = state
        self._is_checked = False
        self.tensors = {name: (self._dtype(name), tuple(tensor.shape)) for name, tensor in state.items()}

    def _dtype(self, name: str) -> Dtype:
        try:
            return dtype_of(self._state[name].dtype)
        except ValueError as error:
            raise WeightsError(f"{self.path}: {name}: {error}") from None

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a tensor, or of a slice of it, copied.

        Raises:
            WeightsError: there is no such tensor or slice, or the file is not what was written.
        """
        if name not in self._state:
            raise WeightsError(f"{self.path}: holds no tensor {name}")
        tensor = self._state[name]
        piece = whole(tensor.shape) if piece is None else piece
        check_slice(f"{self.path}: {name}", tuple(tensor.shape), piece)
        self._check()
        return as_bytes(tensor[tuple(slice(*bounds) for bounds in piece)].detach().clone(memory_format=torch.contiguous_format))

    def _check(self) -> None:
        if not self._is_checked and is_zipfile(self.path):
            try:
                archive = StoredZip(self.path)
                for member in archive.sizes:
                    archive.check(member)
            except BadZipFile as error:
                raise WeightsError(f"{self.path}: {error}") from None
        self._is_checked = True


def _load(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # of a malformed pickle: any
        raise WeightsError(f"{path}: {_refusal(error)}") from None


def _refusal(error: Exception) -> str:
    """Why PyTorch does not read a file. Not in its words where it refuses a name: they advise to run what is refused."""
    told = str(error).strip()
    if found := _GLOBAL.search(told):
        return f"names {found[1]}, which no file of tensors needs. Nothing in it was run"
    if told.startswith("Weights only load failed"):
        return "no PyTorch file of plain tensors (its pickle is malformed, or holds something else). Nothing in it was run"
    return f"no PyTorch file of plain tensors ({told.splitlines()[0] if told else 'empty'})"
