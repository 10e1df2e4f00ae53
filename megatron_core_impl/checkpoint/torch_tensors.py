"""Tensors of PyTorch's files by slices, read at their place in the file."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle, TensorRecord
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.slicing import Slice, whole
from megatron_core_impl.checkpoint.torch_archive import TorchArchive


class TorchTensors:
    """Some tensors of a PyTorch file under names: a `TensorFile`.

    Raises:
        WeightsError: one of them is not stored row by row.
    """

    def __init__(self, archive: TorchArchive, records: Mapping[str, TensorRecord]) -> None:
        self.path = archive.path
        self.tensors = {name: (getattr(torch, record.dtype), record.shape) for name, record in records.items()}
        self._archive = archive
        self._records = dict(records)
        self._places: dict[str, int] = {}
        for name, record in records.items():
            if not record.is_contiguous:
                raise WeightsError(
                    f"{self.path}: {name} is stored with strides {list(record.stride)}, not row by row. Save it anew with "
                    "PyTorch, after .contiguous()"
                )

    def read(self, name: str, piece: Slice | None = None) -> Tensor:
        """A tensor, or a slice of it: on the CPU, contiguous, as stored."""
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: holds no tensor {name}")
        dtype, shape = self.tensors[name]
        piece = whole(shape) if piece is None else piece
        check_slice(f"{self.path}: {name}", shape, piece)
        first, last = piece[0] if shape else (0, 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = self._bytes(self._place(name) + first * row, (last - first) * row).view(dtype).reshape(-1, *shape[1:])
        if not shape:
            return rows.reshape(())
        return rows[:, *(slice(*bounds) for bounds in piece[1:])].contiguous()

    def _place(self, name: str) -> int:
        if name not in self._places:
            record = self._records[name]
            try:
                start = self._archive.place(record.storage)
            except RefusedPickle as error:
                raise WeightsError(str(error)) from None
            self._places[name] = start + record.offset * self.tensors[name][0].itemsize
        return self._places[name]

    def _bytes(self, place: int, count: int) -> Tensor:
        if place + count > self.path.stat().st_size:  # before memory is taken at the word of a header
            raise WeightsError(f"{self.path}: is truncated: it ends inside its data")
        out = torch.empty(count, dtype=torch.uint8)
        view = out.numpy().data if count else memoryview(b"")
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while view:
                done = os.preadv(descriptor, [view], place)
                if done == 0:
                    raise WeightsError(f"{self.path}: is truncated: it ends at byte {place:,}, inside its data")
                view, place = view[done:], place + done
        finally:
            os.close(descriptor)
        return out
