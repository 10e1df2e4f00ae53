"""One reader for every form of stored weights; what was written under one layout loads under any other, bit for bit."""

import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_core_impl.checkpoint import proven, sharded
from megatron_core_impl.checkpoint.digests import Follower, file_digest
from megatron_core_impl.checkpoint.dtypes import Bytes, dtype_of
from megatron_core_impl.checkpoint.index import INDEX_FILE, Index
from megatron_core_impl.checkpoint.proven import Advance, NotEqual, Target, same_bits, write_tensors
from megatron_core_impl.checkpoint.reshard import plan, reshard
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter, WeightsError
from megatron_core_impl.checkpoint.sharded import (
    WeightsReader,
    described_tensors,
    open_rank_file,
    open_weights,
    write_index,
    write_rank_file,
)
from megatron_core_impl.checkpoint.slicing import (
    Slice,
    dp_rows,
    is_on_pp_rank,
    rank_slices,
    replica,
    row_blocks,
    shape_of,
    tp_slice,
    whole,
)
from megatron_core_impl.config import Layout, ModelConfig, TensorSpec
from megatron_core_impl.models import families

# 300 rows of vocabulary: cut 256 + 44 for tp=2 and 128 + 128 + 44 + 0 for tp=4
CONFIG = ModelConfig(
    family="llama", vocab_size=300, hidden_size=8, intermediate_size=12, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=4, head_dim=2, max_position_embeddings=32,
)  # fmt: skip
SPECS = families.tensors(CONFIG)
LAYOUTS = [Layout(tp=tp, pp=pp) for tp, pp in product((1, 2, 4), (1, 2, 4))]


def random_bits(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    count = torch.Size(spec.shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(spec.shape)


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    """Every tensor of the model as random bits, NaNs included; norms in another precision than matrices."""
    torch.manual_seed(0)
    return {spec.name: random_bits(spec, torch.float32 if len(spec.shape) == 1 else torch.bfloat16) for spec in SPECS}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, model: dict[str, Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    save_file(model, folder / "model.safetensors", {"format": "pt"})
    return folder


def cut(tensor: Tensor, piece: Slice) -> Tensor:
    return tensor[tuple(slice(*bounds) for bounds in piece)].contiguous()


def layout_name(layout: Layout) -> str:
    return f"tp{layout.tp}-pp{layout.pp}-dp{layout.dp}"


# ── Shard and merge ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_merge_of_shard_is_the_model_bit_for_bit(tmp_path: Path, hf: Path, model: dict[str, Tensor], layout: Layout) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "merged").mkdir()
    shards = reshard(open_weights(hf), tmp_path / "shards", SPECS, layout)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        INDEX_FILE, *(f"rank-{rank:04d}.safetensors" for rank in range(layout.tp * layout.pp)),
    ]  # fmt: skip
    assert shards.extra == {"layout": {"tp": layout.tp, "pp": layout.pp, "dp": 1, "vpp": 1}}
    # What a rank will hold in training is what it reads, and a file holds what its rank reads and nothing it does not.
    for rank in range(layout.world_size):
        slices = rank_slices(SPECS, CONFIG.num_hidden_layers, layout, rank)
        assert all(same_bits(shards.read(name, piece), cut(model[name], piece)) for name, piece in slices.items())
        file = load_file(tmp_path / "shards" / f"rank-{rank:04d}.safetensors")
        assert all(same_bits(tensor, cut(model[name], slices[name])) for name, tensor in file.items())
    reshard(shards, tmp_path / "merged", SPECS, Layout())
    merged = load_file(tmp_path / "merged" / "rank-0000.safetensors")
    assert merged.keys() == model.keys()
    assert all(same_bits(merged[name], tensor) for name, tensor in model.items())


def test_replicated_tensors_are_stored_once_and_padding_never() -> None:
    ranks = plan(SPECS, Layout(tp=4, pp=2))
    assert ["model.norm.weight" in rank for rank in ranks] == [False] * 4 + [True] + [False] * 3
    assert [shape_of(rank["model.embed_tokens.weight"])[0] for rank in ranks[:3]] == [128, 128, 44]
    assert "model.embed_tokens.weight" not in ranks[3]
    stored = sum(torch.Size(shape_of(piece)).numel() for rank in ranks for piece in rank.values())
    assert stored == families.count_parameters(CONFIG)


def test_tied_model_stores_its_embedding_on_the_first_pp_stage(tmp_path: Path, model: dict[str, Tensor]) -> None:
    specs = families.tensors(replace(CONFIG, tie_word_embeddings=True))
    save_file({spec.name: model[spec.name] for spec in specs}, tmp_path / "model.safetensors")
    (tmp_path / "shards").mkdir()
    shards = reshard(open_weights(tmp_path), tmp_path / "shards", specs, Layout(pp=2))
    assert "lm_head.weight" not in shards.names
    assert same_bits(shards.read("model.embed_tokens.weight"), model["model.embed_tokens.weight"])


def test_conversion_of_dtype_is_torch_s(tmp_path: Path) -> None:
    masters = {spec.name: torch.randn(spec.shape) for spec in SPECS}
    save_file(masters, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    out = reshard(open_weights(tmp_path), tmp_path / "out", SPECS, Layout(tp=2), dtype=dtype_of("bfloat16"))
    assert all(same_bits(out.read(name), tensor.bfloat16()) for name, tensor in masters.items())


@pytest.mark.parametrize("damaged", ["model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_writing_that_goes_wrong_is_noticed(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    """In the middle, and in the last tensor of all."""
    real = SafetensorsWriter.write_bytes

    def faulty(self: SafetensorsWriter, name: str, first: int, rows: Bytes) -> None:
        if name == damaged:
            rows = rows.copy()
            rows[-1, -1, -1] ^= 1
        real(self, name, first, rows)

    monkeypatch.setattr(SafetensorsWriter, "write_bytes", faulty)
    with pytest.raises(NotEqual, match=rf"^{damaged}: .* differs from its source in \[0:\d+, 0:8\]"):
        reshard(open_weights(hf), tmp_path, SPECS, Layout())


def test_a_file_of_another_precision_is_noticed(tmp_path: Path, hf: Path) -> None:
    """The same bits mean other numbers in float16 and bfloat16."""
    source = open_weights(hf)
    name = next(name for name in source.names if source.dtype(name).itemsize == 2)
    other = dtype_of("float16" if source.dtype(name).name == "bfloat16" else "bfloat16")
    piece = whole(source.shape(name))
    entry, advance = (name, other, source.shape(name), piece), Advance(lambda done, total, text: None, 1)
    with Follower() as follower, suppress(ValueError), open_rank_file(tmp_path, 0, [entry], follower) as writer:
        written = WeightsReader(tmp_path, Index(described_tensors(tmp_path), {}, {}), {})
        with pytest.raises(NotEqual, match=rf"^{name}: is written as {other}, not as {source.dtype(name)}$"):
            write_tensors([Target(writer, {name: piece})], source, None, advance, written, follower)


def test_same_bits_is_stricter_than_equal() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert not same_bits(zero, zero.reshape(1, 1))


def test_progress_reaches_the_end(tmp_path: Path, hf: Path) -> None:
    told: list[tuple[float, float, str]] = []
    reshard(open_weights(hf), tmp_path, SPECS, Layout(tp=2, pp=2), progress=lambda *args: told.append(args))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[0][2] == "writing model.layers.0.input_layernorm.weight"  # norms are wide here, and come first in the file
    assert told[-1][2].startswith("writing ")


def test_more_ranks_than_files_that_a_process_may_have_open(tmp_path: Path, hf: Path, model: dict[str, Tensor]) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, allowed[1]))
    try:
        shards = reshard(open_weights(hf), tmp_path, SPECS, Layout(tp=4, pp=5, dp=4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert len(shards.index.files) == 80
    assert all(same_bits(shards.read(name), tensor) for name, tensor in model.items())


def test_weights_that_are_not_the_model_s(tmp_path: Path, hf: Path) -> None:
    larger = families.tensors(replace(CONFIG, num_hidden_layers=6))
    with pytest.raises(WeightsError, match=r"lacks model\.layers\.5\.input_layernorm\.weight, .* and 6 more$"):
        reshard(open_weights(hf), tmp_path, larger, Layout())
    wider = families.tensors(replace(CONFIG, vocab_size=301))
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight has shape \[300, 8\], the model needs \[301, 8\]"):
        reshard(open_weights(hf), tmp_path, wider, Layout())
    assert list(tmp_path.iterdir()) == []


# ── Training checkpoints: cut over dp too, moments beside the masters ─────────────────────────────────────────────────


def save_checkpoint(folder: Path, layout: Layout, state: dict[str, Tensor], *, leave_out: int | None = None) -> None:
    """What the ranks of a training write: rows of their tp slice, as ZeRO-1 owns them; replicas over tp once."""
    folder.mkdir()
    for rank in range(layout.world_size):
        if rank == leave_out:
            continue
        pp_rank, dp_rank, tp_rank = layout.coordinates(rank)
        pieces = []
        for spec in SPECS:
            if not is_on_pp_rank(spec, CONFIG.num_hidden_layers, layout, pp_rank):
                continue
            if replica(spec, layout, pp_rank, tp_rank) > 0:
                continue
            piece = tp_slice(spec, layout.tp, tp_rank)
            start, stop = dp_rows(piece[0][1] - piece[0][0], layout.dp, dp_rank)
            own = ((piece[0][0] + start, piece[0][0] + stop), *piece[1:])
            for name in (spec.name, f"exp_avg.{spec.name}", f"exp_avg_sq.{spec.name}"):
                pieces.append((name, spec.shape, own, cut(state[name], own)))
        write_rank_file(folder, rank, pieces)
    write_index(folder, layout={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}, step=7)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    names = [(f"{kind}{spec.name}", spec) for kind in ("", "exp_avg.", "exp_avg_sq.") for spec in SPECS]
    return {name: random_bits(spec, torch.float32) for name, spec in names}


@pytest.mark.parametrize("layout", [replace(layout, dp=dp) for layout in LAYOUTS for dp in (1, 3)], ids=layout_name)
def test_checkpoint_loads_under_any_other_layout(tmp_path: Path, state: dict[str, Tensor], layout: Layout) -> None:
    save_checkpoint(tmp_path / "step", layout, state)
    reader = open_weights(tmp_path / "step")
    assert set(reader.names) == set(state)
    assert reader.extra["step"] == 7
    for other in (Layout(), Layout(tp=2), Layout(tp=4, pp=2), Layout(tp=1, pp=4)):
        for rank in range(other.world_size):
            for name, piece in rank_slices(SPECS, CONFIG.num_hidden_layers, other, rank).items():
                for kind in ("", "exp_avg."):
                    assert same_bits(reader.read(kind + name, piece), cut(state[kind + name], piece))


def test_checkpoint_merges_to_the_masters(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path / "step", Layout(tp=2, pp=2, dp=3), state)
    (tmp_path / "merged").mkdir()
    merged = reshard(open_weights(tmp_path / "step"), tmp_path / "merged", SPECS, Layout())
    assert set(merged.names) == {spec.name for spec in SPECS}
    assert all(same_bits(merged.read(name), state[name]) for name in merged.names)


def test_rank_that_did_not_write_is_noticed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight: its pieces .* the file of a rank is missing"):
        save_checkpoint(tmp_path / "step", Layout(tp=2, dp=2), state, leave_out=3)
    assert not (tmp_path / "step" / INDEX_FILE).exists()


def test_rank_files_that_do_not_fit_together(tmp_path: Path) -> None:
    rows = torch.zeros(3, 2)
    write_rank_file(tmp_path, 0, [("w", (4, 2), ((0, 3), (0, 2)), rows)])
    write_rank_file(tmp_path, 1, [("w", (4, 2), ((1, 4), (0, 2)), rows)])
    with pytest.raises(WeightsError, match=r"w: pieces overlap: \[0:3, 0:2\] in rank-0000\S+ and \[1:4, 0:2\] in rank-0001"):
        write_index(tmp_path)
    write_rank_file(tmp_path, 1, [("w", (6, 2), ((3, 6), (0, 2)), rows)])
    with pytest.raises(WeightsError, match=r"w: rank-0001\S+ says float32 \[6, 2\], rank-0000\S+ says float32 \[4, 2\]"):
        write_index(tmp_path)
    write_rank_file(tmp_path, 1, [("w", (4, 2), ((3, 6), (0, 2)), rows)])
    with pytest.raises(WeightsError, match=r"w: the piece in rank-0001\S+ the tensor: has shape \[4, 2\]"):
        write_index(tmp_path)
    save_file({"w": rows}, tmp_path / "rank-0001.safetensors")
    with pytest.raises(WeightsError, match=r"rank-0001\.safetensors: not a rank's file"):
        write_index(tmp_path)


def test_numbers_and_empty_pieces(tmp_path: Path) -> None:
    write_rank_file(tmp_path, 0, [("n", (), (), torch.tensor(3.5)), ("w", (2,), ((0, 2),), torch.ones(2))])
    write_rank_file(tmp_path, 1, [("w", (2,), ((2, 2),), torch.ones(0))])
    write_index(tmp_path)
    reader = open_weights(tmp_path)
    assert reader.read("n").item() == 3.5
    assert reader.read("w", ((1, 1),)).shape == (0,)
    assert torch.equal(reader.read("w", dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def test_reshard_records_what_it_wrote(tmp_path: Path, hf: Path) -> None:
    shards = reshard(open_weights(hf), tmp_path, SPECS, Layout(tp=2, pp=2))
    assert shards.index.files == {path.name: file_digest(path) for path in tmp_path.glob("*.safetensors")}
    assert len(shards.index.files) == 4


def test_pieces_larger_than_a_block_are_put_together_block_by_block(
    tmp_path: Path, hf: Path, model: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(piece: Slice, itemsize: int) -> Iterator[Slice]:
        return row_blocks(piece, itemsize, limit=100)

    monkeypatch.setattr(sharded, "row_blocks", small)
    monkeypatch.setattr(proven, "row_blocks", small)
    shards = reshard(open_weights(hf), tmp_path, SPECS, Layout(tp=2, pp=2))
    assert all(same_bits(shards.read(name), tensor) for name, tensor in model.items())
    assert all(same_bits(shards.read(n, whole(t.shape), torch.float64), t.double()) for n, t in model.items())
