"""Rows for added tokens: the mean of the stored ones, wherever a slice begins and ends."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import open_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_slice(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(5, 4).to(dtype)
    save_file({"rows": table, "other": table.clone()}, tmp_path / "model.safetensors")
    grown = Grown(open_weights(tmp_path), ["rows"], 8)
    mean = (table.double().sum(0) / 5).to(dtype)
    whole = torch.cat([table, mean.expand(3, 4)])
    assert (grown.shape("rows"), grown.shape("other"), grown.dtype("rows")) == ((8, 4), (5, 4), dtype)
    for start in range(8):
        for stop in range(start + 1, 9):
            assert torch.equal(grown.read("rows", ((start, stop), (1, 3))), whole[start:stop, 1:3])
    assert torch.equal(grown.read("rows", dtype=torch.float64), whole.double())
    assert torch.equal(grown.read("other"), table)
    with pytest.raises(WeightsError, match="rows"):
        grown.read("rows", ((0, 9), (0, 4)))
    assert Grown(open_weights(tmp_path), ["rows"], 3).shape("rows") == (5, 4), "a vocabulary that is larger already stays"
