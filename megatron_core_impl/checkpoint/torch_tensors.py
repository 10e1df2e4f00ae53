"""Tensors of PyTorch's files by slices, read at their place in the file.

Before the first of the numbers of a storage are used, all of them are compared with the checksum in the archive.
"""

import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_core_impl.checkpoint.dtypes import Bytes, as_bytes, dtype_of
from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle, TensorRecord
from megatron_core_impl.checkpoint.safetensors_io import WeightsError, check_slice
from megatron_core_impl.checkpoint.slicing import Slice, whole
from megatron_core_impl.checkpoint.source import TensorFile
from megatron_core_impl.checkpoint.torch_archive import TorchArchive


class TorchTensors(TensorFile):
    """Some tensors of a PyTorch file under names.

    Raises:
        WeightsError: one of them uses a number of its storage twice.
    """

    def __init__(self, archive: TorchArchive, records: Mapping[str, TensorRecord]) -> None:
        self.path = archive.path
        self.tensors = {name: (dtype_of(record.dtype), record.shape) for name, record in records.items()}
        self.has_checksums = archive.has_checksums
        self._archive = archive
        self._records = dict(records)
        self._places: dict[str, int] = {}
        for name, record in records.items():
            if record.overlaps:
                raise WeightsError(
                    f"{self.path}: {name} has shape {list(record.shape)} and strides {list(record.stride)}: it repeats numbers "
                    "that are stored once. Save it anew with PyTorch, after .contiguous()"
                )

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        """The numbers of a tensor, or of a slice of it, as stored.

        Raises:
            WeightsError: there is no such tensor or slice, or its numbers are not those that were written.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: holds no tensor {name}")
        dtype, shape = self.tensors[name]
        piece = whole(shape) if piece is None else piece
        check_slice(f"{self.path}: {name}", shape, piece)
        place = self._place(name)
        if not self._records[name].is_contiguous:
            part = self._mapped(name, place)[tuple(slice(*bounds) for bounds in piece)]
            return as_bytes(part.clone(memory_format=torch.contiguous_format))
        first, last = piece[0] if shape else (0, 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = self._bytes(place + first * row, (last - first) * row).reshape(-1, *shape[1:], dtype.itemsize)
        if not shape:
            return rows.reshape(-1)
        return np.ascontiguousarray(rows[:, *(slice(*bounds) for bounds in piece[1:])])

    def _place(self, name: str) -> int:
        if name not in self._places:
            record = self._records[name]
            try:
                start = self._archive.place(record.storage)
            except RefusedPickle as error:
                raise WeightsError(f"{self.path}: {name}: {error}") from None
            self._places[name] = start + record.offset * self.tensors[name][0].itemsize
        return self._places[name]

    def _mapped(self, name: str, place: int) -> Tensor:
        """A tensor that is not stored row by row, such as a transposed one: mapped into memory, to be copied from."""
        record = self._records[name]
        count = record.last + 1 - record.offset
        data = np.memmap(self.path, np.uint8, "c", place, (count * self.tensors[name][0].itemsize,))
        return torch.from_numpy(data).view(self.tensors[name][0].torch).as_strided(record.shape, record.stride)

    def _bytes(self, place: int, count: int) -> Bytes:
        if place + count > self.path.stat().st_size:  # before memory is taken at the word of a header
            raise WeightsError(f"{self.path}: is truncated: it ends inside its data")
        out: Bytes = np.empty(count, np.uint8)
        view = out.data if count else memoryview(b"")
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
