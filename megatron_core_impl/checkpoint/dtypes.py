"""Precisions of stored numbers, and their bytes as NumPy has them.

Nothing here needs PyTorch unless tensors are asked for: importing it takes as long as copying gigabytes. So what only moves
numbers moves their bytes, as arrays of `uint8` whose last dim is the bytes of one number: they are sliced, joined and put in
order as the numbers would be, whatever the precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Bytes = npt.NDArray[np.uint8]  # [*shape, itemsize]
Floats = npt.NDArray[np.float64]  # [*shape]


@dataclass(frozen=True)
class Dtype:
    """A precision."""

    code: str  # in the header of a safetensors file
    name: str  # PyTorch's, and ours in index.json
    itemsize: int

    def __str__(self) -> str:
        return self.name

    @property
    def torch(self) -> torch.dtype:
        """The same in PyTorch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


DTYPES = {
    code: Dtype(code, name, itemsize)
    for code, name, itemsize in (
        ("F64", "float64", 8), ("F32", "float32", 4), ("F16", "float16", 2), ("BF16", "bfloat16", 2),
        ("I64", "int64", 8), ("I32", "int32", 4), ("I16", "int16", 2), ("I8", "int8", 1),
        ("U64", "uint64", 8), ("U32", "uint32", 4), ("U16", "uint16", 2), ("U8", "uint8", 1),
        ("BOOL", "bool", 1), ("F8_E4M3", "float8_e4m3fn", 1), ("F8_E5M2", "float8_e5m2", 1),
    )
}  # fmt: skip
NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


def dtype_of(dtype: torch.dtype | str) -> Dtype:
    """A precision of PyTorch, or by its name.

    Raises:
        ValueError: it cannot be stored.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in NAMES:
        raise ValueError(f"dtype {name} cannot be stored; known: {', '.join(NAMES)}")
    return NAMES[name]


def as_tensor(data: Bytes, dtype: Dtype) -> Tensor:
    """Numbers as a tensor on the CPU that shares their memory. `data` must be contiguous."""
    import torch

    if not data.size:  # NumPy's strides say nothing then
        return torch.empty(data.shape[:-1], dtype=dtype.torch)
    return torch.from_numpy(data).view(dtype.torch).reshape(data.shape[:-1])


def as_bytes(tensor: Tensor) -> Bytes:
    """The numbers of a tensor on any device, contiguous: its own memory where it is on the CPU and contiguous already."""
    import torch

    data: Bytes = tensor.detach().cpu().contiguous().reshape(*tensor.shape, 1).view(torch.uint8).numpy()
    return data


def to_floats(data: Bytes, dtype: Dtype) -> Floats:
    """Numbers in double precision.

    Raises:
        ValueError: they are no floating-point numbers of 16 bits or more.
    """
    shape = data.shape[:-1]
    if dtype.name == "bfloat16":  # the upper half of a float32
        numbers = (data.view("<u2").reshape(shape).astype("<u4") << 16).view("<f4")
    else:
        numbers = data.view(_numpy(dtype)).reshape(shape)
    with np.errstate(invalid="ignore"):  # of what is no number
        return numbers.astype(np.float64)


def from_floats(values: Floats, dtype: Dtype) -> Bytes:
    """Numbers rounded to a precision as PyTorch rounds them: to single precision first, to the nearest, ties to even.

    Raises:
        ValueError: it is no floating-point precision of 16 bits or more.
    """
    if dtype.name == "float64":
        return np.ascontiguousarray(values, "<f8")[..., None].view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite
        single = values.astype("<f4")
        if dtype.name != "bfloat16":
            return np.ascontiguousarray(single.astype(_numpy(dtype)))[..., None].view(np.uint8)
    bits = single.view("<u4")
    rounded = np.where(np.isnan(single), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.ascontiguousarray(rounded)[..., None].view(np.uint8)


def _numpy(dtype: Dtype) -> str:
    kinds = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}
    if dtype.name not in kinds:
        raise ValueError(f"{dtype} is no floating-point precision of 16 bits or more")
    return kinds[dtype.name]
