"""Any topology to any other, bit for bit: weights and optimizer state, read by slices and written anew. No processes.

The oracle is the whole tensors that every checkpoint was cut from.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_core_impl.checkpoint import training
from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.relayout import relayout, state_specs
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import WeightsReader, open_weights, write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import Slice, owned_slice, rank_slices, shape_of, stored_slices
from megatron_core_impl.config import Layout, ModelConfig, TensorSpec, padded_vocab_size
from megatron_core_impl.models.families import tensors

# Tied, so that the embedding lies on two pp ranks; two key/value heads, which tp 4 holds twice; dims that dp 2 does not divide;
# a vocabulary of which the last ranks of tp 4 hold a part, and nothing.
CONFIG = ModelConfig(
    family="llama", vocab_size=300, hidden_size=5, intermediate_size=12, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
SPECS = tensors(CONFIG)
LAYOUTS = [Layout(tp=tp, pp=pp, dp=dp) for tp, pp, dp in product((1, 2, 4), (1, 2, 4), (1, 2))]
STATES = ("", "exp_avg.", "exp_avg_sq.")
STEP = 7


def quiet(done: float, total: float, text: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Masters and moments as random bits, NaNs included."""
    torch.manual_seed(0)
    sizes = {state + spec.name: torch.Size(spec.shape) for spec in SPECS for state in STATES}
    return {
        name: torch.randint(0, 256, (4 * size.numel(),), dtype=torch.uint8).view(torch.float32).reshape(size)
        for name, size in sizes.items()
    }


def cut(tensor: Tensor, piece: Slice) -> Tensor:
    return tensor[tuple(slice(*bounds) for bounds in piece)].contiguous()


def states_of_ranks(specs: list[TensorSpec], layout: Layout) -> Iterator[dict[str, Slice]]:
    """What the optimizer of each rank owns, replicas included, as `parallel.shard` cuts it."""
    for rank in range(layout.world_size):
        _, dp_rank, _ = layout.coordinates(rank)
        slices = rank_slices(specs, CONFIG.num_hidden_layers, layout, rank)
        padded = padded_vocab_size(CONFIG.vocab_size, layout.tp) // layout.tp
        yield {
            spec.name: owned_slice(piece, padded if spec.padded else shape_of(piece)[0], layout.dp, dp_rank)
            for spec in specs
            if (piece := slices.get(spec.name)) is not None
        }


def write_checkpoint(root: Path, whole: dict[str, Tensor], layout: Layout) -> Path:
    """A checkpoint as training leaves it, made of the pieces of the whole tensors that each rank stores."""
    folder = training.unfinished_folder(root, STEP)
    folder.mkdir(parents=True)
    for rank in range(layout.world_size):
        pieces = []
        for name, piece in stored_slices(SPECS, CONFIG.num_hidden_layers, layout, rank).items():
            for state in STATES:
                tensor = whole[state + name]
                pieces.append((state + name, tuple(tensor.shape), piece, cut(tensor, piece)))
        write_rank_file(folder, rank, pieces)
    write_index(folder, layout=asdict(layout), step=STEP)
    state = {"step": STEP, "consumed_samples": 56, "must_agree": {"lr": 0.1}, "layout": asdict(layout)}
    training.commit(root, STEP, state, keep=2)
    return training.step_folder(root, STEP)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Tensor]) -> dict[Layout, WeightsReader]:
    """The same state under each layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: open_weights(write_checkpoint(root / str(n), whole, layout)) for n, layout in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def wanted() -> dict[Layout, list[dict[str, Slice]]]:
    """For each layout what each of its ranks loads. Together the ranks have everything, or the comparison would be of less."""
    return {layout: list(states_of_ranks(SPECS, layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: f"from-tp{layout.tp}-pp{layout.pp}-dp{layout.dp}")
def test_every_layout_loads_under_every_other(
    checkpoints: dict[Layout, WeightsReader],
    wanted: dict[Layout, list[dict[str, Slice]]],
    whole: dict[str, Tensor],
    source: Layout,
) -> None:
    """18 sources by 18 targets: each rank of a target reads its weights and its optimizer's state out of the source's files."""
    reader = checkpoints[source]
    assert set(reader.names) == set(whole)
    right: set[tuple[str, Slice]] = set()  # slices that several ranks or targets read are read once
    for target, ranks in wanted.items():
        covered = {name: torch.zeros(whole[name].shape, dtype=torch.bool) for name in (spec.name for spec in SPECS)}
        for rank, slices in enumerate(ranks):
            for name, piece in slices.items():
                covered[name][tuple(slice(*bounds) for bounds in piece)] = True
                if (name, piece) in right:
                    continue
                for state in STATES:
                    got = reader.read(state + name, piece)
                    assert same_bits(got, cut(whole[state + name], piece)), f"{state}{name}{piece} of rank {rank} of {target}"
                right.add((name, piece))
        assert all(everything.all() for everything in covered.values()), target


def test_every_layout_stores_every_number_once() -> None:
    """Not twice where key/value heads or a tied embedding lie on several ranks. (That nothing lacks, the index guarantees.)"""
    numbers = sum(torch.Size(spec.shape).numel() for spec in SPECS)
    for layout in LAYOUTS:
        size = sum(
            torch.Size(shape_of(piece)).numel()
            for rank in range(layout.world_size)
            for piece in stored_slices(SPECS, CONFIG.num_hidden_layers, layout, rank).values()
        )
        assert size == numbers


CHAIN = [
    Layout(tp=4, pp=2, dp=2), Layout(), Layout(pp=2, vpp=2, dp=2), Layout(tp=2, pp=4), Layout(dp=2),
    Layout(tp=4, pp=4, dp=2), Layout(tp=2, dp=4), Layout(tp=4, pp=2, dp=2),
]  # fmt: skip


def test_a_checkpoint_goes_through_a_chain_of_layouts(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """Each is what a training under that layout would have written, file by file, and the last is the first."""
    write_checkpoint(tmp_path / "0", whole, CHAIN[0])
    for number, (_, layout) in enumerate(pairwise(CHAIN), start=1):
        root = tmp_path / str(number)
        folder = relayout(training.step_folder(tmp_path / str(number - 1), STEP), root, SPECS, layout, progress=quiet)
        assert folder == training.step_folder(root, STEP)
        assert training.finished_steps(root) == [STEP]
        direct = write_checkpoint(tmp_path / f"direct-{number}", whole, layout)
        assert {path.name for path in folder.iterdir()} == {path.name for path in direct.iterdir()}
        for path in folder.iterdir():
            if path.name != training.STATE_FILE:
                assert contents(path) == contents(direct / path.name), path
        state = training.read_state(folder)
        training.check_files(folder, training.recorded_files(folder, state))
        assert state["layout"] == asdict(layout)
        assert (state["consumed_samples"], state["must_agree"]) == (56, {"lr": 0.1})
        reader = open_weights(folder)
        assert all(same_bits(reader.read(name), tensor) for name, tensor in whole.items())


def contents(path: Path) -> Any:
    """What a file says, in whatever order."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        pieces = json.loads(file.metadata()["pieces"])
        return pieces, {name: file.get_tensor(name).view(torch.uint8).tolist() for name in file.keys()}  # noqa: SIM118


def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "a", whole, Layout(dp=2))
    file = folder / "rank-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(training.DamagedCheckpoint, match=r"rank-0001\.safetensors: is not what was written"):
        relayout(training.step_folder(tmp_path / "a", STEP), tmp_path / "b", SPECS, Layout(), progress=quiet)
    assert not (tmp_path / "b").exists()


def test_a_run_that_is_stopped_leaves_nothing(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    def stop(done: float, total: float, text: str) -> None:
        raise KeyboardInterrupt

    write_checkpoint(tmp_path / "a", whole, Layout(dp=2))
    with pytest.raises(KeyboardInterrupt):
        relayout(training.step_folder(tmp_path / "a", STEP), tmp_path / "b", SPECS, Layout(), progress=stop)
    assert list((tmp_path / "b").iterdir()) == []
    relayout(training.step_folder(tmp_path / "a", STEP), tmp_path / "b", SPECS, Layout(), progress=quiet)
    with pytest.raises(FileExistsError, match="is there already"):
        relayout(training.step_folder(tmp_path / "a", STEP), tmp_path / "b", SPECS, Layout(), progress=quiet)


def test_tensors_of_another_model_are_refused() -> None:
    names = [spec.name for spec in SPECS]
    with pytest.raises(WeightsError, match=r"holds exp_avg\.lm_head\.weight, which belongs to no tensor of the model"):
        state_specs(Path("x"), [*names, "exp_avg.lm_head.weight"], SPECS)
    with pytest.raises(WeightsError, match=r"lacks model\.norm\.weight, which the model"):
        state_specs(Path("x"), [name for name in names if name != "model.norm.weight"], SPECS)
    assert state_specs(Path("x"), [f"exp_avg.{names[0]}", *names], SPECS)[0] == replace(SPECS[0], name=f"exp_avg.{names[0]}")
