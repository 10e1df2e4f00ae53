"""The sharded optimizer: its checkpoints under every layout, its precision, what it refuses."""

import math
from typing import Any

import pytest
import tiny
import torch
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.checkpoint.slicing import Slice
from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.families import tensors
from megatron_core_impl.parallel.finalize import sum_of_squares
from megatron_core_impl.parallel.zero import ZeroOptimizer

CONFIG = tiny.GROUPED
LAYOUTS = [Layout(), Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2)]
SETTINGS: dict[str, Any] = {"betas": tiny.BETAS, "eps": tiny.EPS, "weight_decay": tiny.WEIGHT_DECAY, "clip_grad": tiny.CLIP}
Pieces = list[tuple[str, tuple[int, ...], Slice, Tensor]]


def train(
    layout: Layout, steps: range, weights: dict[str, Tensor], state: dict[str, Tensor] | None, dtype: torch.dtype
) -> Pieces:
    """Some steps from given weights, or from a checkpoint's state; returns what this rank writes to a checkpoint."""
    mesh = init_mesh(layout, "cpu")
    model = tiny.loaded(CONFIG, mesh, weights, dtype)
    optimizer = ZeroOptimizer(model, mesh, **SETTINGS)
    if state is not None:
        optimizer.load(tiny.MemoryReader(state))
        optimizer.step_count = steps.start
    for step in steps:
        optimizer.begin_step()
        for batch in tiny.micro_batches(CONFIG, step)[mesh.dp_rank :: layout.dp]:
            model.loss(batch.tokens, batch.labels, batch.weights).backward()
        optimizer.step(tiny.LR)
    return [(name, shape, piece, values.clone()) for name, shape, piece, values in optimizer.named_pieces()]


def assemble(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors of all ranks' pieces, which must tile them: no gap, no overlap."""
    state: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for name, shape, piece, values in (piece for pieces in ranks for piece in pieces):
        where = tuple(slice(*r) for r in piece)
        state.setdefault(name, values.new_empty(shape))[where] = values
        covered.setdefault(name, torch.zeros(shape, dtype=torch.int32))[where] += 1
    assert all((count == 1).all() for count in covered.values())
    return state


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_checkpoints_move_between_layouts_bit_for_bit(pool: GlooPool, layout: Layout) -> None:
    weights = tiny.random_weights(CONFIG)
    state = assemble(pool.run(train, 2, Layout(dp=2), range(2), weights, None, torch.float64))
    assert set(state) == {f"{prefix}{spec.name}" for spec in tensors(CONFIG) for prefix in ("", "exp_avg.", "exp_avg_sq.")}

    again = assemble(pool.run(train, layout.world_size, layout, range(2, 2), weights, state, torch.float64))
    assert all(torch.equal(again[name], state[name]) for name in state)

    resumed = assemble(pool.run(train, layout.world_size, layout, range(2, 3), weights, state, torch.float64))
    straight = assemble(pool.run(train, 2, Layout(dp=2), range(3), weights, None, torch.float64))
    for name in state:
        if layout == Layout(dp=2):
            assert torch.equal(resumed[name], straight[name]), name
        else:
            torch.testing.assert_close(resumed[name], straight[name], rtol=1e-9, atol=1e-12)


def observe_precision(weights: dict[str, Tensor]) -> dict[str, Any]:
    mesh = init_mesh(Layout(dp=2), "cpu")
    model = tiny.loaded(CONFIG, mesh, weights, torch.bfloat16)
    optimizer = ZeroOptimizer(model, mesh, **SETTINGS)
    for batch in tiny.micro_batches(CONFIG, 1)[mesh.dp_rank :: 2]:
        model.loss(batch.tokens, batch.labels, batch.weights).backward()
    main_grads = {shard.main_grad.dtype for shard in optimizer._shards.values()}
    assert all(p.grad is None for p in model.parameters())
    optimizer.step(1e-6)
    return {
        "main_grads": main_grads,
        "pieces": [(*what, values.clone()) for *what, values in optimizer.named_pieces()],
        "is_published": all(torch.equal(s.own_data, s.master.to(s.own_data.dtype)) for s in optimizer._shards.values()),
    }


def test_bf16_keeps_masters_gradients_and_moments_in_fp32(pool: GlooPool) -> None:
    weights = tiny.random_weights(CONFIG, torch.bfloat16)
    ranks = pool.run(observe_precision, 2, weights)
    for rank in ranks:
        assert rank["main_grads"] == {torch.float32}
        assert rank["is_published"]
    state = assemble([rank["pieces"] for rank in ranks])
    assert {values.dtype for values in state.values()} == {torch.float32}
    # Steps far below what bf16 resolves: only a master in fp32 moves.
    moved = (state["lm_head.weight"] - weights["lm_head.weight"].float()).abs()
    assert 0 < moved.max() < 1e-5


def single_optimizer(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Any, ZeroOptimizer]:
    model = tiny.loaded(CONFIG, Mesh.single(), tiny.random_weights(CONFIG), dtype)
    return model, ZeroOptimizer(model, Mesh.single(), **(SETTINGS | changes))


def backward(model: Any, scale: float = 1.0) -> None:
    for batch in tiny.micro_batches(CONFIG, 1):
        model.loss(batch.tokens, batch.labels, batch.weights * scale).backward()


def test_where_the_model_computes_in_fp32_its_storage_is_the_master() -> None:
    _, optimizer = single_optimizer(torch.float32)
    for shard in optimizer._shards.values():
        assert shard.master.data_ptr() == shard.parameter.data_ptr()


def test_masters_can_be_loaded_with_more_digits_than_the_model_has() -> None:
    model, optimizer = single_optimizer(torch.bfloat16)
    weights = tiny.random_weights(CONFIG, torch.float32)
    optimizer.load_masters(tiny.MemoryReader(weights))
    for name, shape, _, values in optimizer.named_pieces():
        if name in weights:
            assert torch.equal(values, weights[name])
            assert torch.equal(model.sharded_parameters()[name][: shape[0]], weights[name].bfloat16())


def test_a_gradient_that_is_not_finite_stops_before_anything_changes() -> None:
    model, optimizer = single_optimizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, scale=math.nan)
    with pytest.raises(FloatingPointError, match=r"^the gradient norm of step 1 is nan; nothing was updated$"):
        optimizer.step(tiny.LR)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert optimizer.step_count == 0


def test_a_step_starts_from_no_gradients() -> None:
    model, optimizer = single_optimizer(clip_grad=0.0)
    backward(model)
    optimizer.begin_step()
    backward(model)
    other_model, other = single_optimizer(clip_grad=0.0)
    backward(other_model)
    norm = optimizer.step(0.0)
    assert norm == other.step(0.0)
    assert optimizer.step(0.0) == 0.0  # no backward pass since
    backward(model)
    assert optimizer.step(0.0) == norm


def train_over_rubbish(weights: dict[str, Tensor], rubbish: float) -> Pieces:
    mesh = init_mesh(Layout(dp=2), "cpu")
    model = tiny.loaded(tiny.TIED, mesh, weights)  # its dims of 15 leave the last rank a padded row
    optimizer = ZeroOptimizer(model, mesh, **SETTINGS)
    for shard in optimizer._shards.values():
        shard.main_grad.fill_(rubbish)
    optimizer.begin_step()
    for batch in tiny.micro_batches(tiny.TIED, 1)[mesh.dp_rank :: 2]:
        model.loss(batch.tokens, batch.labels, batch.weights).backward()
    optimizer.step(tiny.LR)
    return optimizer.named_pieces()


def test_what_the_last_step_left_in_the_main_gradients_does_not_matter(pool: GlooPool) -> None:
    weights = tiny.random_weights(tiny.TIED)
    clean, dirty = (assemble(pool.run(train_over_rubbish, 2, weights, rubbish)) for rubbish in (0.0, math.nan))
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)


def test_clipping_scales_the_gradient_to_the_given_norm() -> None:
    moments = {}
    for clip in (0.0, 0.5, 1e9):
        model, optimizer = single_optimizer(clip_grad=clip)
        backward(model)
        norm = optimizer.step(tiny.LR)
        moments[clip] = {n: v.clone() for n, *_, v in optimizer.named_pieces() if n.startswith("exp_avg.")}
    for name, value in moments[0.0].items():
        assert torch.equal(moments[1e9][name], value)
        torch.testing.assert_close(moments[0.5][name], value * (0.5 / (norm + 1e-6)), rtol=1e-12, atol=0)


def test_the_norm_of_a_large_tensor_is_exact_enough_to_compare_runs() -> None:
    tensor = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    exact = tensor.double().square().sum().item()
    assert sum_of_squares([tensor[:2048], tensor[2048:]], tensor.device).item() == pytest.approx(exact, rel=1e-6)
