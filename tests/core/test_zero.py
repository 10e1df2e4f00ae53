"""The sharded optimizer: its checkpoints under every layout, its precision, what it refuses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.checkpoint.slicing import Slice
from megatron_core_impl.config import Layout
from megatron_core_impl.loss_scale import DynamicLossScale
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.families import tensors
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.finalize import sum_of_squares
from megatron_core_impl.parallel.zero import ZeroOptimizer, moment_names

CONFIG = tiny.GROUPED
LAYOUTS = [Layout(), Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2)]
Pieces = list[tuple[str, tuple[int, ...], Slice, Tensor]]


SGD = replace(tiny.SETTINGS, kind="sgd", momentum=0.9)
DECAYS = (0.1, 0.3, 0.9)  # of three steps: a ramp


def train(
    layout: Layout,
    steps: range,
    settings: OptimizerSettings,
    weights: dict[str, Tensor],
    state: dict[str, Tensor] | None = None,
) -> Pieces:
    """Some steps from given weights, or from a checkpoint's state; returns what this rank writes to a checkpoint."""
    mesh = init_mesh(layout, "cpu")
    model = tiny.loaded(CONFIG, mesh, weights)
    optimizer = ZeroOptimizer(model, mesh, settings)
    if state is not None:
        optimizer.load(tiny.MemoryReader(state))
        optimizer.step_count = steps.start
    for step in steps:
        mine = tiny.micro_batches(CONFIG, step)[mesh.dp_rank :: layout.dp]
        optimizer.begin_step(len(mine))
        for batch in mine:
            model.loss(batch.tokens, batch.labels, batch.weights).backward()
        optimizer.complete_gradients()  # to look at them changes nothing
        optimizer.step(tiny.LR, weight_decay=DECAYS[step])
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


@pytest.mark.parametrize(
    ("layout", "settings"),
    [*((layout, tiny.SETTINGS) for layout in LAYOUTS), (Layout(tp=2, dp=2), SGD)],
    ids=lambda it: it.kind if isinstance(it, OptimizerSettings) else str(it),
)
def test_checkpoints_move_between_layouts_bit_for_bit(pool: GlooPool, layout: Layout, settings: OptimizerSettings) -> None:
    weights = tiny.random_weights(CONFIG)
    state = assemble(pool.run(train, 2, Layout(dp=2), range(2), settings, weights))
    prefixes = ("", *(f"{name}." for name in moment_names(settings)))
    assert set(state) == {f"{prefix}{spec.name}" for spec in tensors(CONFIG) for prefix in prefixes}

    again = assemble(pool.run(train, layout.world_size, layout, range(2, 2), settings, weights, state))
    assert all(torch.equal(again[name], state[name]) for name in state)

    resumed = assemble(pool.run(train, layout.world_size, layout, range(2, 3), settings, weights, state))
    straight = assemble(pool.run(train, 2, Layout(dp=2), range(3), settings, weights))
    for name in state:
        if layout == Layout(dp=2):
            assert torch.equal(resumed[name], straight[name]), name
        else:
            torch.testing.assert_close(resumed[name], straight[name], rtol=1e-9, atol=1e-12)


def train_plainly(settings: OptimizerSettings, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same three steps with autograd and PyTorch's own optimizer and clipping."""
    model = tiny.loaded(CONFIG, Mesh.single(), weights)
    parameters = dict(model.named_parameters())
    groups = [{"params": [p for p in parameters.values() if (p.ndim > 1) == decays]} for decays in (True, False)]
    if settings.kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=tiny.LR, betas=tiny.BETAS, eps=tiny.EPS, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, lr=tiny.LR, momentum=settings.momentum, foreach=False)
    for step, decay in enumerate(DECAYS):
        optimizer.zero_grad()
        for batch in tiny.micro_batches(CONFIG, step):
            model.loss(batch.tokens, batch.labels, batch.weights).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), tiny.CLIP)
        optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"] = decay, 0.0
        optimizer.step()
    state = {name: p.detach() for name, p in parameters.items()}
    state |= {f"{m}.{name}": optimizer.state[p][m] for name, p in parameters.items() for m in moment_names(settings)}
    return state


@pytest.mark.parametrize("settings", [tiny.SETTINGS, SGD, replace(SGD, momentum=0.0)], ids=["adamw", "sgd", "sgd-plain"])
def test_updates_are_those_of_torch(pool: GlooPool, settings: OptimizerSettings) -> None:
    weights = tiny.random_weights(CONFIG)
    want = train_plainly(settings, weights)
    got = assemble(pool.run(train, 2, Layout(dp=2), range(3), settings, weights))
    assert got.keys() == want.keys()
    for name, values in got.items():
        torch.testing.assert_close(values, want[name][: values.shape[0]], rtol=1e-9, atol=1e-13)


def observe_precision(weights: dict[str, Tensor]) -> dict[str, Any]:
    mesh = init_mesh(Layout(dp=2), "cpu")
    model = tiny.loaded(CONFIG, mesh, weights, torch.bfloat16)
    optimizer = ZeroOptimizer(model, mesh, tiny.SETTINGS)
    for batch in tiny.micro_batches(CONFIG, 1)[mesh.dp_rank :: 2]:
        model.loss(batch.tokens, batch.labels, batch.weights).backward()
    main_grads = {shard.main_grad.dtype for shard in optimizer._shards.values()}
    assert all(p.grad is None for p in model.parameters())
    optimizer.step(1e-6)
    optimizer.wait_for_weights()
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
    return model, ZeroOptimizer(model, Mesh.single(), replace(tiny.SETTINGS, **changes))


def backward(model: Any, scale: float = 1.0) -> None:
    for batch in tiny.micro_batches(CONFIG, 1)[:2]:
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
    optimizer.begin_step(tiny.NUM_MICROBATCHES)
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
    optimizer = ZeroOptimizer(model, mesh, tiny.SETTINGS)
    for shard in optimizer._shards.values():
        shard.main_grad.fill_(rubbish)
    optimizer.begin_step(0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_loss_s_scale_leaves_no_trace(dtype: torch.dtype) -> None:
    states = []
    for scale in (1.0, 2.0**10):
        model, optimizer = single_optimizer(dtype)
        backward(model, scale)
        norm = optimizer.step(tiny.LR, loss_scale=scale)
        states.append({name: values.clone() for name, *_, values in optimizer.named_pieces()} | {"norm": torch.tensor(norm)})
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-6, atol=1e-12)


def test_fp16_finds_the_scale_that_it_can_bear() -> None:
    model, optimizer = single_optimizer(torch.float16)
    scale = DynamicLossScale(initial=2.0**20, hysteresis=1, window=4)
    norms: list[float] = []
    start = {name: values.clone() for name, *_, values in optimizer.named_pieces()}
    for _ in range(8):
        optimizer.begin_step(tiny.NUM_MICROBATCHES)
        backward(model, scale.scale)
        try:
            norms.append(optimizer.step(tiny.LR, loss_scale=scale.scale))
        except FloatingPointError:
            assert not norms, "once it has found its scale, it loses it to growth only, which comes after 4 steps"
            assert all(torch.equal(values, start[name]) for name, *_, values in optimizer.named_pieces())
        scale.update(is_finite=bool(norms))
        if len(norms) == 3:
            break
    assert scale.scale < 2.0**20
    assert optimizer.step_count == len(norms) == 3
    exact_model, exact = single_optimizer(torch.float32)
    backward(exact_model)
    assert norms[0] == pytest.approx(exact.step(tiny.LR), rel=1e-2)
    assert norms[2] < norms[0], "it learns the one batch that it sees"


def test_the_norm_of_a_large_tensor_is_exact_enough_to_compare_runs() -> None:
    tensor = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    exact = tensor.double().square().sum().item()
    assert sum_of_squares([tensor[:2048], tensor[2048:]], tensor.device).item() == pytest.approx(exact, rel=1e-6)
