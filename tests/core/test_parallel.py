"""Tensor, pipeline and data parallel training against plain training in one process, in float64: it must be the same training.

The last test removes each collective in turn, and requires that the comparison notices: the net has no holes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from distributed import GlooPool

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Messages, Pending
from megatron_core_impl.config import Layout, ModelConfig, Recompute
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.parallel.parallelize import parallelize

TOLERANCE = 1e-9
SHAPES = {"grouped": tiny.GROUPED, "tied": tiny.TIED, "falcon": tiny.FALCON, "biased": tiny.BIASED}
RECOMPUTE = {
    "none": Recompute(),
    "selective": Recompute(mode="selective"),
    "full": Recompute(mode="full"),
    "full2": Recompute(mode="full", layers_per_unit=2),
}
Case = tuple[str, int, str]  # shape, vpp, recompute
Site = tuple[str, str]  # the collective, and the function that calls it


def legal_tp(config: ModelConfig) -> list[int]:
    def is_legal(tp: int) -> bool:
        try:
            Layout(tp=tp).check(config)
        except ValueError:
            return False
        return tiny.MICRO_BATCH_SIZE * tiny.LENGTH % tp == 0

    return [tp for tp in range(1, 9) if is_legal(tp)]


def cases_of(layout: Layout) -> list[Case]:
    """Everything that a layout is tried with: shapes × schedules × recompute, where they go together."""
    per_replica = tiny.NUM_MICROBATCHES // layout.dp
    is_interleaved = layout.pp > 1 and tiny.NUM_MICROBATCHES % layout.dp == 0 and per_replica % layout.pp == 0
    return [
        (shape, vpp, recompute)
        for shape, config in SHAPES.items()
        if layout.tp in legal_tp(config)
        for vpp in ((1, 2, 3) if is_interleaved else (1,))
        if layout.pp * vpp <= NUM_LAYERS or vpp == 1
        for recompute in RECOMPUTE
    ]


def layouts() -> list[Layout]:
    """All products of up to 8 processes that some shape can be cut for."""
    sizes = range(1, 9)
    found = [Layout(tp=tp, pp=pp, dp=dp) for tp, pp, dp in product(sizes, sizes, sizes) if tp * pp * dp <= 8]
    return [layout for layout in found if cases_of(layout)]


def some(layout: Layout) -> list[Case]:
    """A few cases, others for each layout, so that all of them together see every pair of settings many times.

    Of the layouts of many processes that talk all the time one: each takes ten seconds of the cores.
    """
    cases, number = cases_of(layout), layouts().index(layout)
    few = cases[number % len(cases) :: 11] or cases[:1]
    return few[:1] if layout.tp * layout.pp >= 6 and layout.tp > 1 else few


NUM_LAYERS = 7  # uneven over 2, 3, 4, 5 and 6 pp stages
ALL = os.environ.get("PARITY") == "all"  # the whole matrix takes a quarter of an hour


def deep(shape: str, layout: Layout) -> ModelConfig:
    """A shape with enough layers for a layout, and no more: 2 where pp is 1."""
    return replace(SHAPES[shape], num_hidden_layers=2 if layout.pp == 1 else max(NUM_LAYERS, layout.pp))


@cache
def wanted(config: ModelConfig) -> tuple[dict[str, torch.Tensor], tiny.Trace]:
    weights = tiny.random_weights(config)
    return weights, tiny.reference(config, weights)


def train_cases(layout: Layout, cases: list[tuple[ModelConfig, int, Recompute, dict[str, torch.Tensor]]]) -> list[tiny.Trace]:
    meshes: dict[int, Mesh] = {}  # making the groups of one takes longer than training does
    traces = []
    for config, vpp, recompute, weights in cases:
        replicas, virtual = layout.kv_replicas(config), replace(layout, vpp=vpp)
        if replicas not in meshes:
            meshes[replicas] = init_mesh(layout, "cpu", kv_replicas=replicas)
        mesh = replace(meshes[replicas], layout=virtual)
        traces.append(tiny.train_rank(config, virtual, weights, recompute=recompute, mesh=mesh))
    return traces


@pytest.mark.timeout(3600 if ALL else 300)  # eight processes share what cores there are
@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: f"tp{layout.tp}-pp{layout.pp}-dp{layout.dp}")
def test_every_layout_is_the_same_training(pool: GlooPool, layout: Layout) -> None:
    cases = cases_of(layout) if ALL else some(layout)
    configs = [deep(shape, layout) for shape, _, _ in cases]
    jobs = [(config, vpp, RECOMPUTE[mode], wanted(config)[0]) for config, (_, vpp, mode) in zip(configs, cases, strict=True)]
    ranks = pool.run(train_cases, layout.world_size, layout, jobs, timeout=60 + 60 * len(cases))
    for n, (case, config) in enumerate(zip(cases, configs, strict=True)):
        want = wanted(config)[1]
        got = tiny.assemble(config, replace(layout, vpp=case[1]), [traces[n] for traces in ranks])
        assert min(want.norms) > tiny.CLIP, "the test must clip"
        wrong = {what: error for what, error in tiny.differences(got, want).items() if error > TOLERANCE}
        assert wrong == {}, f"{case}"


# Every place where a collective is called. A new one fails the test below until it is listed here, and is tested with it.
SITES: list[Site] = [
    ("all_gather", "_ColumnLinear.backward"),
    ("all_gather", "_ColumnLinear.forward"),
    ("all_gather", "_Embedding.backward"),
    ("all_gather", "_LinearCrossEntropy.forward: tokens"),
    ("all_gather", "_LinearCrossEntropy.forward: totals"),
    ("all_gather", "_RowLinear.backward"),
    ("all_gather_blocks_", "Bucket.start_gathering"),
    ("all_reduce_", "complete_gradients"),
    ("all_reduce_blocks_", "_sum_over_kv_replicas"),
    ("all_reduce_blocks_", "_sum_over_tokens"),
    ("reduce_scatter", "_ColumnLinear.backward"),
    ("reduce_scatter", "_Embedding.forward"),
    ("reduce_scatter", "_LinearCrossEntropy.forward"),
    ("reduce_scatter", "_RowLinear.forward"),
    ("reduce_scatter_blocks_", "Bucket.start_reducing"),
    ("send_and_receive", "_Run._exchange"),
    ("send_and_receive", "_sum_over_ends"),
]


def _receive_nothing(sends: Any, receives: Any, group: Any) -> Messages:
    for tensor, _ in receives:
        tensor.zero_()
    return Messages()


# What each collective does to the tensors of a rank that is alone in the world: the identity, in the right shape.
IDENTITIES: dict[str, Callable[..., Any]] = {
    "all_gather": lambda x, group: Pending(torch.cat([x] * group.size())),
    "reduce_scatter": lambda x, group: Pending(x.chunk(group.size())[group.rank()].clone()),
    "all_reduce_": lambda x, group, op=None: x,
    "all_reduce_blocks_": lambda blocks, group: None,
    "reduce_scatter_blocks_": lambda blocks, group, rank: None,
    "all_gather_blocks_": lambda blocks, group, rank: None,
    "send_and_receive": _receive_nothing,
}


@contextmanager
def without(site: Site | None, seen: set[Site]) -> Iterator[None]:
    """Call no collective at one site; note all sites where one is called."""
    originals = {name: getattr(collectives, name) for name in IDENTITIES}

    def replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if (args[2] if name == "send_and_receive" else args[1]) is None:  # the axis has size 1
                return originals[name](*args, **options)
            where = sys._getframe(1).f_code.co_qualname
            if (name, where) == ("all_gather", "_LinearCrossEntropy.forward"):  # the one function that calls one twice
                where += ": tokens" if args[0].ndim == 2 else ": totals"
            seen.add((name, where))
            return (IDENTITIES if (name, where) == site else originals)[name](*args, **options)

        return call

    for name in IDENTITIES:
        setattr(collectives, name, replacement(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)


def train_rank_with_mutations(
    config: ModelConfig, layout: Layout, weights: dict[str, torch.Tensor]
) -> tuple[set[Site], list[Any]]:
    mesh = init_mesh(layout, "cpu", kv_replicas=layout.kv_replicas(config))
    seen: set[Site] = set()
    traces: list[Any] = []
    for site in [None, *SITES]:
        with without(site, seen):
            try:
                traces.append(tiny.train_rank(config, layout, weights, steps=2, mesh=mesh))
            except FloatingPointError as error:
                traces.append(str(error))
    return seen, traces


def test_removing_any_collective_is_noticed(pool: GlooPool) -> None:
    config, layout = tiny.FALCON, Layout(tp=2, pp=2, dp=2)  # key/value heads on two ranks, an embedding at both ends
    weights = tiny.random_weights(config)
    want = tiny.reference(config, weights, steps=2)
    ranks = pool.run(train_rank_with_mutations, layout.world_size, config, layout, weights)
    assert sorted(set().union(*(seen for seen, _ in ranks))) == sorted(SITES)

    def agrees(number: int) -> bool:
        try:
            got = tiny.assemble(config, layout, [traces[number] for _, traces in ranks])
        except (AssertionError, AttributeError):  # ranks disagree among themselves, or nothing finite came out
            return False
        return max(tiny.differences(got, want).values()) < TOLERANCE

    assert agrees(0), "with all collectives the comparison must pass"
    assert [site for number, site in enumerate(SITES, start=1) if agrees(number)] == []


def refuse_layouts() -> list[str]:
    messages = []
    for act in (
        lambda: init_mesh(Layout(tp=2, dp=2), "cpu"),
        lambda: parallelize(tiny.GROUPED, init_mesh(Layout(tp=2), "cpu"), dtype=torch.float32)(
            torch.zeros(1, 7, dtype=torch.long)
        ),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            act()
        messages.append(str(caught.value))
    return messages


def test_impossible_layouts_are_refused(pool: GlooPool) -> None:
    wrong_count, odd_tokens = pool.run(refuse_layouts, 2)[1]
    assert wrong_count.startswith("tp=2 × pp=1 × dp=2 needs 4 processes, but 2 were started.")
    assert odd_tokens.startswith("tp=2 does not divide the 1 × 7 tokens of a micro batch")
    with pytest.raises(ValueError, match=r"^tp=2 × pp=1 × dp=1 needs 2 processes with a process group.* torchrun"):
        init_mesh(Layout(tp=2), "cpu")


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ("grouped", Layout(tp=3), r"^tp=3 cannot share out num_attention_heads=8 with num_key_value_heads=2 and "
         r"intermediate_size=24\. Legal here: 1, 2, 4, 6, 8$"),
        ("falcon", Layout(tp=5), r"^tp=5 cannot share out .*num_attention_heads=9.* Legal here: 1, 2, 3, 4, 6, 8$"),
        ("grouped", Layout(pp=3), r"^pp=3 exceeds num_hidden_layers=2\. Legal here: 1 to 2$"),
        ("grouped", Layout(pp=2, vpp=2), r"^pp=2 × vpp=2 exceeds num_hidden_layers=2\. Legal vpp here: 1 to 1$"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_hold_a_model_are_refused(shape: str, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(SHAPES[shape], replace(Mesh.single(), layout=layout), dtype=torch.float32)


def test_virtual_stages_need_a_pipeline() -> None:
    with pytest.raises(ValueError, match=r"^vpp=2 needs pp of at least 2"):
        Layout(vpp=2)
