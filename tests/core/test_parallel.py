"""Tensor and data parallel training against plain training in one process, in float64: it must be the same training.

The last test removes each collective in turn, and requires that the comparison notices: the net has no holes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from distributed import GlooPool

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Pending
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.parallel.parallelize import parallelize

TOLERANCE = 1e-9
LAYOUTS = [Layout(), Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2)]
Site = tuple[str, str]  # the collective, and the function that calls it


def name_of(layout: Layout) -> str:
    return f"tp{layout.tp}-dp{layout.dp}"


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.TIED], ids=["grouped", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_layout_is_the_same_training(pool: GlooPool, layout: Layout, config: ModelConfig) -> None:
    weights = tiny.random_weights(config)
    want = tiny.reference(config, weights)
    got = tiny.assemble(config, layout, pool.run(tiny.train_rank, layout.world_size, config, layout, weights))
    assert min(want.norms) > tiny.CLIP, "the test must clip"
    assert {what: error for what, error in tiny.differences(got, want).items() if error > TOLERANCE} == {}


# Every place where a collective is called. A new one fails the test below until it is listed here, and is tested with it.
SITES: list[Site] = [
    ("all_gather", "_ColumnLinear.backward"),
    ("all_gather", "_ColumnLinear.forward"),
    ("all_gather", "_ReduceScatterTokens.backward"),
    ("all_gather_blocks_", "ZeroOptimizer._publish"),
    ("all_reduce_", "_VocabParallelCrossEntropy.forward: MAX"),
    ("all_reduce_", "_VocabParallelCrossEntropy.forward: SUM"),
    ("all_reduce_", "_sum_: SUM"),
    ("all_reduce_", "finalize_gradients: SUM"),
    ("reduce_scatter", "_ColumnLinear.backward"),
    ("reduce_scatter", "_ReduceScatterTokens.forward"),
    ("reduce_scatter_blocks_", "finalize_gradients"),
]

# What each collective does to the tensors of a rank that is alone in the world: the identity, in the right shape.
IDENTITIES: dict[str, Callable[..., Any]] = {
    "all_gather": lambda x, group: Pending(torch.cat([x] * group.size())),
    "reduce_scatter": lambda x, group: Pending(x.chunk(group.size())[group.rank()].clone()),
    "all_reduce_": lambda x, group, op=None: x,
    "reduce_scatter_blocks_": lambda blocks, group, rank: None,
    "all_gather_blocks_": lambda blocks, group, rank: None,
}


@contextmanager
def without(site: Site | None, seen: set[Site]) -> Iterator[None]:
    """Call no collective at one site; note all sites where one is called."""
    originals = {name: getattr(collectives, name) for name in IDENTITIES}

    def replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if args[1] is None:  # the axis has size 1
                return originals[name](*args)
            where = sys._getframe(1).f_code.co_qualname
            if name == "all_reduce_":
                where += ": MAX" if torch.distributed.ReduceOp.MAX in args[2:] else ": SUM"
            seen.add((name, where))
            return (IDENTITIES if (name, where) == site else originals)[name](*args)

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
    seen: set[Site] = set()
    traces: list[Any] = []
    for site in [None, *SITES]:
        with without(site, seen):
            try:
                traces.append(tiny.train_rank(config, layout, weights, steps=2))
            except FloatingPointError as error:
                traces.append(str(error))
    return seen, traces


def test_removing_any_collective_is_noticed(pool: GlooPool) -> None:
    config, layout = tiny.GROUPED, Layout(tp=2, dp=2)
    weights = tiny.random_weights(config)
    want = tiny.reference(config, weights, steps=2)
    ranks = pool.run(train_rank_with_mutations, layout.world_size, config, layout, weights)
    assert sorted(set().union(*(seen for seen, _ in ranks))) == SITES

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
    ("layout", "message"),
    [
        (Layout(tp=4), r"^tp=4 does not divide num_key_value_heads=2\. Legal here: 1, 2$"),
        (Layout(pp=2), r"^pp=2: this version cuts models over tp only\. Set pp to 1$"),
    ],
)
def test_layouts_that_cannot_hold_a_model_are_refused(layout: Layout, message: str) -> None:
    single = Mesh.single()
    mesh = Mesh(**{**{name: getattr(single, name) for name in single.__dataclass_fields__}, "layout": layout})
    with pytest.raises(ValueError, match=message):
        parallelize(tiny.GROUPED, mesh, dtype=torch.float32)
