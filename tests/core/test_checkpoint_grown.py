"""Rows for added tokens: what they begin as, wherever a slice begins and ends."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.reshard import reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout, NewRows, TensorSpec


def stored(folder: Path, dtype: torch.dtype, rows: int = 5, columns: int = 4) -> Tensor:
    """A table, in a folder together with a tensor that does not grow."""
    torch.manual_seed(0)
    table = (torch.randn(rows, columns) * torch.linspace(0.1, 3, columns) + torch.linspace(-1, 1, columns)).to(dtype)
    save_file({"rows": table, "other": table.clone()}, folder / "model.safetensors")
    return table


@pytest.mark.parametrize("kind", get_args(NewRows))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_slice(tmp_path: Path, dtype: torch.dtype, kind: NewRows) -> None:
    table = stored(tmp_path, dtype)
    grown = Grown(open_weights(tmp_path), ["rows"], 8, kind)
    new = {
        "mean": (table.double().sum(0) / 5).to(dtype).expand(3, 4),
        "zeros": torch.zeros(3, 4, dtype=dtype),
        "last": table[-1].expand(3, 4),
        "normal": Grown(open_weights(tmp_path), ["rows"], 8, "normal").read("rows")[5:],  # judged below
    }[kind]
    whole = torch.cat([table, new])
    assert (grown.shape("rows"), grown.shape("other"), grown.dtype("rows").torch) == ((8, 4), (5, 4), dtype)
    for start in range(8):
        for stop in range(start + 1, 9):
            assert same_bits(grown.read("rows", ((start, stop), (1, 3))), whole[start:stop, 1:3].contiguous())
    assert torch.equal(grown.read("rows", dtype=torch.float64), whole.double()), "no digits that the stored rows do not have"
    assert torch.equal(grown.read("other"), table)
    with pytest.raises(WeightsError, match="rows"):
        grown.read("rows", ((0, 9), (0, 4)))
    assert Grown(open_weights(tmp_path), ["rows"], 3, kind).shape("rows") == (5, 4), "a vocabulary that is larger stays"


def test_drawn_rows_are_like_the_stored_ones(tmp_path: Path) -> None:
    """Mean and deviation of each column are those of the stored rows, as far as so many draws can tell; all rows differ."""
    table = stored(tmp_path, torch.float32, rows=400).double()
    new = Grown(open_weights(tmp_path), ["rows", "other"], 4400, "normal").read("rows", dtype=torch.float64)[400:]
    deviation = table.std(0, correction=0)
    assert ((new.mean(0) - table.mean(0)).abs() < 5 * deviation / 4000**0.5).all()
    assert ((new.std(0) / deviation - 1).abs() < 5 / 8000**0.5).all()
    assert len(new.unique(dim=0)) == 4000
    other = Grown(open_weights(tmp_path), ["rows", "other"], 4400, "normal").read("other", dtype=torch.float64)[400:]
    assert not torch.equal(new, other), "embedding and output layer are drawn apart"


def test_draws_never_change(tmp_path: Path) -> None:
    """A vocabulary that was grown last year is grown to the same bits today."""
    table = torch.tensor([[-1.0, 3.0], [1.0, 5.0]])  # means 0 and 4, deviations 1
    save_file({"rows": table}, tmp_path / "model.safetensors")
    new = Grown(open_weights(tmp_path), ["rows"], 4, "normal").read("rows")[2:]
    assert new.tolist() == [[-0.19382523000240326, 4.312286376953125], [0.377679705619812, 3.797938346862793]]


@pytest.mark.parametrize("kind", get_args(NewRows))
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4, dp=2)], ids=str)
def test_the_same_rows_under_any_layout(tmp_path: Path, kind: NewRows, layout: Layout) -> None:
    stored(tmp_path, torch.bfloat16, rows=250)
    grown = Grown(open_weights(tmp_path), ["rows"], 260, kind)  # new rows lie on both sides of row 256, where tp 2 cuts
    (tmp_path / "out").mkdir()
    spec = TensorSpec(name="rows", shape=(260, 4), tp_dim=0, place="first", padded=True)
    out = reshard(grown, tmp_path / "out", [spec], layout)
    whole = Grown(open_weights(tmp_path), ["rows"], 260, kind).read("rows")
    assert same_bits(out.read("rows"), whole)
