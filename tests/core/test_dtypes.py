"""Numbers as bytes: what rounding and widening without PyTorch give is what PyTorch gives."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_core_impl.checkpoint.dtypes import DTYPES, as_bytes, as_tensor, dtype_of, from_floats, to_floats

FLOATS = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_precisions_are_pytorch_s(dtype) -> None:  # type: ignore[no-untyped-def]
    assert dtype_of(dtype.torch) == dtype_of(dtype.name) == dtype
    assert dtype.torch.itemsize == dtype.itemsize
    for shape in ((3, 2), (), (0, 4)):
        tensor = torch.zeros(shape).to(dtype.torch)
        data = as_bytes(tensor)
        assert data.shape == (*shape, dtype.itemsize)
        back = as_tensor(data, dtype)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)


def test_of_a_tensor_that_is_cut_the_numbers_are_in_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert torch.equal(as_tensor(as_bytes(tensor[:, 1:3]), dtype_of("float32")), tensor[:, 1:3])
    assert torch.equal(as_tensor(as_bytes(tensor.t()), dtype_of("float32")), tensor.t())


def test_what_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="dtype complex64 cannot be stored; known: float64, float32"):
        dtype_of(torch.complex64)
    with pytest.raises(ValueError, match="int8 is no floating-point precision of 16 bits or more"):
        to_floats(np.zeros((2, 1), np.uint8), dtype_of("int8"))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_widened_as_pytorch_does(name: str) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    found = to_floats(bits[:, None].view(np.uint8), dtype_of(name))
    expected = torch.from_numpy(bits.view("<i2")).view(dtype_of(name).torch).double().numpy()
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_pytorch_s(name: str) -> None:
    """Of numbers of all sizes, of every number halfway between two of 16 bits, and of what is no number."""
    random = np.random.RandomState(0)
    sizes = random.standard_normal(20000) * np.exp2(random.randint(-150, 130, 20000))
    with np.errstate(invalid="ignore"):
        ties = (np.arange(1 << 16, dtype="<u4") << 16 | 0x8000).view("<f4").astype(np.float64)
    halves = np.arange(1 << 15, dtype="<u2").view("<f2").astype(np.float64)
    halves = halves[np.isfinite(halves)]
    values = np.concatenate([sizes, ties[~np.isnan(ties)], (halves[:-1] + halves[1:]) / 2, [0.0, -0.0, np.inf, -np.inf]])
    found = as_tensor(from_floats(values, dtype_of(name)), dtype_of(name))
    expected = torch.from_numpy(values).to(dtype_of(name).torch)
    assert torch.equal(as_tensor(as_bytes(found), dtype_of(name)), expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))
    assert as_tensor(from_floats(np.array([np.nan]), dtype_of(name)), dtype_of(name)).isnan().all()


def test_what_only_moves_numbers_needs_no_pytorch() -> None:
    """Importing it takes as long as copying gigabytes: convert, shard, and what export writes do without."""
    stages = "import sys, stages.convert, stages.shard, stages.merge, stages.export_weights"
    code = f"{stages}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
