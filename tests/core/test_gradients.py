"""How gradients add up: in a shard, over all ranks that hold a parameter, and under the backward passes of other layers."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl import collectives
from megatron_core_impl.config import Heads, Layout, TensorSpec
from megatron_core_impl.layers.parameter import ParameterFactory, ShardedParameter
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.parallel.finalize import complete_gradients
from megatron_core_impl.parallel.shard import Shard
from megatron_core_impl.parallel.zero import ZeroOptimizer

ROWS, TOKENS, FEATURES = 700, 5, 300  # more numbers than are added at once


def parameter(spec: TensorSpec, mesh: Mesh, dtype: torch.dtype, *, sees_all_tokens: bool = True) -> ShardedParameter:
    made = ParameterFactory({spec.name: spec}, mesh, dtype, mesh.device)(spec.name, sees_all_tokens=sees_all_tokens)
    torch.nn.init.normal_(made, generator=torch.Generator().manual_seed(7))
    return made


def matrix(rows: int = ROWS, columns: int = FEATURES, name: str = "w") -> TensorSpec:
    return TensorSpec(name=name, shape=(rows, columns), tp_dim=None, place="layer")


def over_rubbish(dtype: torch.dtype) -> Shard:
    shard = Shard(parameter(matrix(), Mesh.single(), dtype), Mesh.single(), moments=())
    shard.main_grad.fill_(math.nan)
    return shard


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_adds_up_gradients_of_every_form(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    by_product, whole, by_rows = over_rubbish(dtype), over_rubbish(dtype), over_rubbish(dtype)
    product_sum, row_sum = torch.zeros(2, ROWS, FEATURES, dtype=wide)
    for _ in range(count):
        dy = torch.randn(TOKENS, ROWS, generator=generator).to(dtype)
        x = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype)
        ids = torch.randint(ROWS, (TOKENS,), generator=generator)
        ids[1] = ids[0]  # a token that comes twice
        by_product.add_product(dy, x)
        whole.add(dy.t() @ x)
        by_rows.add_rows(ids, x)
        product_sum += (dy.t() @ x).to(wide)
        row_sum.index_put_((ids,), x.to(wide), accumulate=True)
    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for shard, want in ((by_product, product_sum), (whole, product_sum), (by_rows, row_sum)):
        assert shard.main_grad.dtype == wide
        torch.testing.assert_close(shard.main_grad, want, **exact)


def test_small_gradients_do_not_vanish_beside_large_ones() -> None:
    shard = over_rubbish(torch.bfloat16)
    shard.add(torch.ones(ROWS, FEATURES, dtype=torch.bfloat16))
    for _ in range(8):  # in bf16, 1 + 2⁻¹⁰ is 1
        shard.add_product(torch.full((1, ROWS), 2.0**-5, dtype=torch.bfloat16), torch.full((1, FEATURES), 2.0**-5).bfloat16())
    assert torch.equal(shard.main_grad, torch.full_like(shard.main_grad, 1 + 2.0**-7))


def test_no_gradient_may_come_after_they_are_summed_up() -> None:
    model = tiny.loaded(tiny.GROUPED, Mesh.single(), tiny.random_weights(tiny.GROUPED))
    optimizer = ZeroOptimizer(model, Mesh.single(), tiny.SETTINGS)
    batch = tiny.micro_batches(tiny.GROUPED, 0)[0]
    optimizer.begin_step(1)
    model.loss(batch.tokens, batch.labels, batch.weights).backward()
    optimizer.complete_gradients()
    with pytest.raises(RuntimeError, match=r"^lm_head\.weight gets a gradient after .* more backward passes than"):
        model.loss(batch.tokens, batch.labels, batch.weights).backward()


def complete_stand_ins(layout: Layout, specs: list[TensorSpec], partial: str) -> dict[str, Any]:
    """Complete gradients that hold 1, 2 … on the ranks 0, 1 …, with ranks for every purpose."""
    mesh = init_mesh(
        layout, "cpu", kv_replicas=max([layout.tp // s.heads.num_key_value_heads for s in specs if s.heads] or [1])
    )
    parameters = [parameter(spec, mesh, torch.float64, sees_all_tokens=spec.name != partial) for spec in specs]
    grads = [torch.full_like(p, mesh.rank + 1, requires_grad=False) for p in parameters]
    norm = complete_gradients(parameters, grads, mesh)
    return {"grads": {p.spec.name: (p.piece, grad) for p, grad in zip(parameters, grads, strict=True)}, "norm": norm.item()}


def test_what_several_ranks_hold_is_summed_over_them_and_counted_once(pool: GlooPool) -> None:
    kv = Heads(num_attention_heads=8, num_key_value_heads=2, head_dim=1, is_kv=True)
    specs = [
        TensorSpec(name="k", shape=(2, 3), tp_dim=0, place="layer", heads=kv),  # ranks 0, 1 hold row 0; ranks 2, 3 row 1
        TensorSpec(name="q", shape=(8, 3), tp_dim=0, place="layer", heads=replace(kv, is_kv=False)),
        TensorSpec(name="norm", shape=(3,), tp_dim=None, place="layer"),
    ]
    ranks = pool.run(complete_stand_ins, 4, Layout(tp=4), specs, "norm")
    for rank, found in enumerate(ranks):
        values = {name: grad.unique().tolist() for name, (_, grad) in found["grads"].items()}
        assert values == {"k": [3.0 if rank < 2 else 7.0], "q": [rank + 1], "norm": [10.0]}
    squares = 3 * (3**2 + 7**2) + 2 * 3 * (1 + 4 + 9 + 16) + 3 * 10**2
    assert {found["norm"] for found in ranks} == {math.sqrt(squares)}


def test_a_tied_embedding_is_summed_over_both_ends_and_counted_once(pool: GlooPool) -> None:
    specs = [TensorSpec(name="embedding", shape=(4, 3), tp_dim=None, place="ends"), matrix(2, 3)]
    ranks = pool.run(complete_stand_ins, 2, Layout(pp=2), specs, "")
    for rank, found in enumerate(ranks):
        assert found["grads"]["embedding"][1].unique().tolist() == [3.0]
        assert found["grads"]["w"][1].unique().tolist() == [rank + 1]
        assert found["norm"] == pytest.approx(math.sqrt(12 * 9 + 6 * (1 + 4)), rel=1e-15)


class Ends(torch.nn.Module):
    """A pp rank's part of a model that is nothing but a tied embedding and, on each rank, a matrix of its own."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.embedding = parameter(TensorSpec(name="embedding", shape=(5, 3), tp_dim=None, place="ends"), mesh, torch.bfloat16)
        self.weight = parameter(matrix(5, 3), mesh, torch.bfloat16)

    def sharded_parameters(self) -> dict[str, ShardedParameter]:
        return {"embedding": self.embedding, "w": self.weight}


def train_ends() -> dict[str, Any]:
    mesh = init_mesh(Layout(pp=2, dp=2), "cpu")
    model: Any = Ends(mesh)
    optimizer = ZeroOptimizer(model, mesh, tiny.SETTINGS)
    for step in range(3):
        optimizer.begin_step(1)
        for number, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + 10 * mesh.rank + number)
            (p * torch.randn(p.shape, generator=generator)).sum().backward()
        optimizer.step(0.1)
    optimizer.wait_for_weights()
    pieces = {name: values for name, _, _, values in optimizer.named_pieces()}
    states = dict(optimizer._shards["embedding"].states("embedding"))
    return {"states": states, "written": set(pieces), "data": model.embedding.detach()}


def test_both_copies_of_a_tied_embedding_stay_equal_bit_for_bit(pool: GlooPool) -> None:
    ranks = pool.run(train_ends, 4)  # rank = 2·pp_rank + dp_rank
    for dp_rank in range(2):
        first, last = ranks[dp_rank], ranks[2 + dp_rank]
        assert all(torch.equal(values, last["states"][name]) for name, values in first["states"].items())
        assert torch.equal(first["data"], last["data"])
        assert "embedding" in first["written"]
        assert not any("embedding" in name for name in last["written"]), "only the first pp rank writes it"
    assert torch.equal(ranks[0]["data"], ranks[1]["data"])


def train_overlapped(overlap: bool, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Three steps on two replicas, and what was under way when."""
    mesh = init_mesh(Layout(dp=2), "cpu")
    model = tiny.loaded(tiny.GROUPED, mesh, weights, dtype)
    optimizer = ZeroOptimizer(model, mesh, replace(tiny.SETTINGS, overlap_reduce=overlap, overlap_gather=overlap))
    buckets = optimizer._buckets.in_order
    started, norms, reducing = [], [], []
    pending_before, pending_after = [], []
    for bucket in buckets:
        original = bucket.start_reducing

        def note(number: int = buckets.index(bucket), original: Any = original) -> None:
            started.append(number)
            original()

        bucket.start_reducing = note  # type: ignore[method-assign]
    for step in range(3):
        mine = tiny.micro_batches(tiny.GROUPED, step)[mesh.dp_rank :: 2]
        optimizer.begin_step(len(mine))
        pending_before.append([bucket._gathering is not None for bucket in buckets])
        for batch in mine:
            loss = model.loss(batch.tokens, batch.labels, batch.weights)
            pending_after.append([bucket._gathering is not None for bucket in buckets])
            loss.backward()
            reducing.append([bucket.is_reducing for bucket in buckets])
        norms.append(optimizer.step(tiny.LR))
    pieces = {name: values for name, _, _, values in optimizer.named_pieces()}
    return {
        "pieces": pieces, "norms": norms, "started": started, "reducing": reducing,
        "pending_before": pending_before, "pending_after": pending_after,
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "buckets": [{shard.parameter.spec.name for shard in bucket.shards} for bucket in buckets],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_overlap_changes_when_and_not_what(pool: GlooPool, dtype: torch.dtype) -> None:
    weights = tiny.random_weights(tiny.GROUPED, dtype)
    on, off = (pool.run(train_overlapped, 2, overlap, weights, dtype) for overlap in (True, False))
    for mine, other in zip(on, off, strict=True):
        assert mine["norms"] == other["norms"]
        for what in ("pieces", "weights"):
            assert all(torch.equal(values, other[what][name]) for name, values in mine[what].items())
    micro_batches = tiny.NUM_MICROBATCHES // 2  # of a replica
    layers = [{name for name in weights if name.startswith(f"model.layers.{layer}.")} for layer in range(2)]
    after = {"model.norm.weight", "lm_head.weight"}
    assert on[0]["buckets"] == [{"model.embed_tokens.weight"}, layers[0], layers[1] | after]
    for found, early in ((on, [False, True, True]), (off, [False] * 3)):
        for rank in found:
            assert rank["started"] == [2, 1, 0] * 3
            assert rank["reducing"] == ([[False] * 3] * (micro_batches - 1) + [early]) * 3, (
                "a reduction starts in the last backward pass, not before"
            )
            assert rank["pending_before"] == [[False] * 3, [any(early)] * 3, [any(early)] * 3]
            assert rank["pending_after"] == [[False] * 3] * 3 * micro_batches, (
                "a forward pass has waited for all the weights that it used"
            )


def reduce_out_of_order() -> list[list[bool]]:
    """What is reduced after each of some gradients, when the first layer is done before the last."""
    mesh = init_mesh(Layout(dp=2), "cpu")
    model = tiny.loaded(tiny.GROUPED, mesh, tiny.random_weights(tiny.GROUPED))
    optimizer = ZeroOptimizer(model, mesh, tiny.SETTINGS)
    buckets = optimizer._buckets.in_order
    optimizer.begin_step(1)
    found = []
    for number in (1, 2):
        for shard in buckets[number].counted:
            shard.add(torch.ones_like(shard.parameter))
        found.append([bucket.is_reducing for bucket in buckets])
    optimizer.complete_gradients()
    return found


def test_buckets_are_reduced_in_one_order_whatever_order_they_are_done_in(pool: GlooPool) -> None:
    assert pool.run(reduce_out_of_order, 2) == [[[False] * 3, [False, True, True]]] * 2


def test_without_replicas_nothing_is_counted_and_nothing_is_hooked() -> None:
    model = tiny.loaded(tiny.GROUPED, Mesh.single(), tiny.random_weights(tiny.GROUPED))
    optimizer = ZeroOptimizer(model, Mesh.single(), tiny.SETTINGS)
    assert optimizer._buckets.in_order == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(shard.on_gradient is None for shard in optimizer._shards.values())


def gradients_with_tp_overlap(overlaps: bool, weights: dict[str, Tensor]) -> tuple[int, Tensor, dict[str, Tensor]]:
    """What a tp rank computes, with the tp collectives under way while it does, or each waited for at once."""
    mesh = init_mesh(Layout(tp=2), "cpu")
    model = tiny.loaded(tiny.GROUPED, mesh, weights, torch.float32)
    batch = tiny.micro_batches(tiny.GROUPED, 0)[0]
    calls = 0

    def at_once(collective: Callable[[Tensor, collectives.Group], collectives.Pending]) -> Any:
        def call(x: Tensor, group: collectives.Group) -> collectives.Pending:
            nonlocal calls
            calls += 1
            pending = collective(x, group)
            return pending if overlaps else collectives.Pending(pending.wait())

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "reduce_scatter"):
            patch.setattr(collectives, name, at_once(getattr(collectives, name)))
        loss = model.loss(batch.tokens, batch.labels, batch.weights)
        loss.backward()  # type: ignore[no-untyped-call]
    return calls, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_overlap_over_tp_changes_when_and_not_what(pool: GlooPool) -> None:
    weights = tiny.random_weights(tiny.GROUPED, torch.float32)
    on, off = (pool.run(gradients_with_tp_overlap, 2, overlaps, weights) for overlaps in (True, False))
    for (calls, loss, grads), (calls_off, loss_off, grads_off) in zip(on, off, strict=True):
        assert calls == calls_off > 20
        assert torch.equal(loss, loss_off)
        assert grads.keys() == grads_off.keys() == weights.keys()
        assert all(torch.equal(grad, grads_off[name]) for name, grad in grads.items())
