"""Pickled PyTorch weights (`pytorch_model*.bin`), read only where a person allowed it. Nothing here ever writes a pickle."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.slicing import Slice, whole


class PickledReader:
    """A `.bin` file of tensors by slices, mapped into memory: pages are read when they are needed.

    `weights_only` admits tensors and plain containers, so a file that carries code raises and runs nothing.

    Raises:
        WeightsError: it is no such file, or holds something else than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = self._load(mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            state = self._load(mmap=False)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(f"{path}: must hold tensors by name and nothing else")
        self._state: dict[str, Tensor] = state
        self.tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._state.items()}

    def _load(self, *, mmap: bool) -> object:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except (UnpicklingError, EOFError, ValueError) as error:
            first = str(error).strip().splitlines()
            raise WeightsError(f"{self.path}: no PyTorch file of plain tensors ({first[0] if first else 'empty'})") from None
        except RuntimeError as error:
            if mmap:
                raise
            first = str(error).strip().splitlines()
            raise WeightsError(f"{self.path}: no PyTorch file of plain tensors ({first[0] if first else 'empty'})") from None

    def read(self, name: str, piece: Slice | None = None) -> Tensor:
        """A tensor, or a slice of it, copied: contiguous, as stored."""
        if name not in self._state:
            raise WeightsError(f"{self.path}: holds no tensor {name}")
        tensor = self._state[name]
        piece = whole(tensor.shape) if piece is None else piece
        check_slice(f"{self.path}: {name}", tuple(tensor.shape), piece)
        return tensor[tuple(slice(*bounds) for bounds in piece)].detach().clone(memory_format=torch.contiguous_format)
