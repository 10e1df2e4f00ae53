"""Recomputed activations: the same bits in every gradient, in any order of micro batches, and fewer bytes in between."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from activations import CONFIGS, DROPOUT, LLAMA, MODES, NONE, Storages, micro_batches, mode_name, model_of
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.config import Dropout, Layout, ModelConfig, Recompute
from megatron_core_impl.layers.recompute import produced
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.random import seed_step

Gradients = dict[str, Tensor]


def gradients(model: Transformer) -> Gradients:
    return {name: p.grad.clone() for name, p in model.sharded_parameters().items() if p.grad is not None}


def differing(got: Gradients, want: Gradients) -> list[str]:
    assert got.keys() == want.keys()
    return [name for name in want if not torch.equal(got[name], want[name])]


# Orders of forward (F) and backward (B) passes of micro batches: one after the other, 1F1B on an early pp rank, all in reverse.
ORDERS = ["F0 B0 F1 B1 F2 B2", "F0 F1 B0 F2 B1 B2", "F0 F1 F2 B2 B1 B0"]


def run(model: Transformer, order: str) -> tuple[list[float], Gradients]:
    """The losses and the summed gradients of micro batches on a model that is whole, and at a step of the same seed."""
    seed_step(1, 1, model.mesh)
    batches, losses = micro_batches(model.config, 3), {}
    for action in order.split():
        number = int(action[1:])
        if action[0] == "F":
            losses[number] = model.forward_chunk(0, None, batches[number])
        else:
            losses[number].backward()
    return [losses[number].item() for number in sorted(losses)], gradients(model)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_bits_in_every_order(config: ModelConfig, dropout: Dropout | None) -> None:
    for order in ORDERS:
        losses, want = run(model_of(config, NONE, dropout=dropout), order)
        assert len(want) == len(list(model_of(config, NONE).parameters()))
        for mode in MODES:
            got_losses, got = run(model_of(config, mode, dropout=dropout), order)
            assert got_losses == losses, (mode, order)
            assert differing(got, want) == [], (mode, order)


@pytest.mark.parametrize("dropout", [Dropout(hidden=0.3), Dropout(attention=0.3)], ids=["hidden", "attention"])
def test_the_same_bits_in_bf16(dropout: Dropout) -> None:
    _, want = run(model_of(LLAMA, NONE, dropout=dropout, dtype=torch.bfloat16), ORDERS[1])
    for mode in MODES:
        _, got = run(model_of(LLAMA, mode, dropout=dropout, dtype=torch.bfloat16), ORDERS[1])
        assert differing(got, want) == [], mode


def one_f_one_b(recompute: Recompute) -> Gradients:
    """Three micro batches through two pp ranks, both played by this process, in the order that 1F1B gives each."""
    single = Mesh.single()
    meshes = [replace(single, layout=Layout(pp=2), rank=rank, pp_rank=rank) for rank in range(2)]
    first, last = (model_of(LLAMA, recompute, mesh=mesh, dropout=DROPOUT) for mesh in meshes)
    seed_step(1, 1, single)
    batches = micro_batches(LLAMA, 3)
    sent: dict[int, Tensor] = {}

    def forward(number: int) -> None:
        sent[number] = first.forward_chunk(0, None, batches[number])

    def finish(number: int) -> None:
        received = sent[number].detach().requires_grad_()
        last.forward_chunk(0, received, batches[number]).backward()
        sent.pop(number).backward(received.grad)

    for action in (lambda: forward(0), lambda: forward(1), lambda: finish(0), lambda: forward(2), lambda: finish(1),
                   lambda: finish(2)):  # fmt: skip
        action()
    return gradients(first) | gradients(last)


def test_the_same_bits_under_a_pipeline() -> None:
    want = one_f_one_b(NONE)
    for mode in MODES:
        assert differing(one_f_one_b(mode), want) == [], mode


def run_with_tp(config: ModelConfig, recompute: Recompute) -> tuple[list[float], Gradients]:
    mesh = init_mesh(Layout(tp=2), "cpu")
    return run(model_of(config, recompute, mesh=mesh, dropout=DROPOUT), ORDERS[1])


@pytest.mark.parametrize("name", ["llama", "falcon-two-norms"])
def test_the_same_bits_under_tp(pool: GlooPool, name: str) -> None:
    config = replace(CONFIGS[name], num_key_value_heads=2)
    want = pool.run(run_with_tp, 2, config, NONE)
    for mode in MODES:
        got = pool.run(run_with_tp, 2, config, mode)
        for rank in range(2):
            assert got[rank][0] == want[rank][0], mode
            assert differing(got[rank][1], want[rank][1]) == [], (mode, rank)


@pytest.mark.parametrize("mode", [NONE, *MODES], ids=mode_name)
def test_a_sink_gets_one_gradient_per_parameter_and_micro_batch(mode: Recompute) -> None:
    class Sink:
        def __init__(self) -> None:
            self.count = 0

        def count_one(self, *gradient: Tensor) -> None:
            self.count += 1

        add = add_product = add_rows = count_one

    def give(parameter: Any) -> None:  # what autograd delivers; the hook runs, without a gradient, after linear layers too
        if parameter.grad is not None:
            parameter.sink.add(parameter.grad)
            parameter.grad = None

    model = model_of(LLAMA, mode)
    sinks = {}
    for name, parameter in model.sharded_parameters().items():
        parameter.sink = sinks[name] = Sink()
        parameter.register_post_accumulate_grad_hook(give)
    for batch in micro_batches(LLAMA, 2):
        model.forward_chunk(0, None, batch).backward()
    assert {name: sink.count for name, sink in sinks.items() if sink.count != 2} == {}


# What autograd keeps of a layer, in numbers per token: with all of it, and what selective recompute drops.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_that_are_kept(config: ModelConfig) -> None:
    def kept(recompute: Recompute) -> int:
        model = model_of(config, recompute)
        batch = micro_batches(config, 1, length=64)[0]
        with Storages() as storages:
            loss = model.forward_chunk(0, None, batch)
        del batch
        assert loss.requires_grad
        return storages.alive

    tokens, layers, hidden = 2 * 64, config.num_hidden_layers, config.hidden_size
    norms = 2 if not config.has_shared_norm else 1
    product = 0 if config.activation == "relu" else config.intermediate_size  # relu keeps its result instead of its input
    none, selective, full, pairs = (kept(mode) for mode in (NONE, *MODES))
    assert none - selective == 4 * tokens * layers * (norms * hidden + product)
    assert full - pairs == 4 * tokens * hidden  # three units of a layer, or one of two layers and one of one
    assert full < selective - 4 * tokens * layers * hidden


def test_produced_computes_again_only_when_the_result_is_needed() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x * 2

    def result(is_kept: bool, use: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.arange(6.0).requires_grad_()
        with produced(double, x, is_kept=is_kept) as doubled:
            y = use(doubled)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    def views(x: Tensor) -> Tensor:  # keeps the result twice, once in another shape
        return (x.view(2, 3).t()[1:] ** 2).sum() + x.exp().sum() + x[3:].sin().sum()

    want = result(True, views)
    assert calls == [True]
    calls.clear()
    assert torch.equal(result(False, views), want)
    assert calls == [True, False, False], "once for each that has kept it: the square and the sine; exp keeps its own result"
    calls.clear()
    result(False, lambda x: x + 1)
    assert calls == [True], "nobody has kept it"
    with torch.no_grad(), produced(double, torch.ones(2), is_kept=False) as doubled:
        assert doubled.tolist() == [2, 2]


def test_produced_inside_of_produced() -> None:
    def grad(is_kept: bool) -> tuple[Tensor, int]:
        with Storages() as storages:
            x = torch.arange(100.0).requires_grad_()
            with produced(torch.sin, x, is_kept=is_kept) as sine:
                y = sine**2
                with produced(torch.cos, y, is_kept=is_kept) as cosine:
                    z = (cosine**2).sum()
            del sine, cosine, y
            kept = storages.alive
            z.backward()
        assert x.grad is not None
        return x.grad, kept

    (plain, plain_bytes), (again, again_bytes) = grad(True), grad(False)
    assert torch.equal(plain, again)
    assert plain_bytes - again_bytes == 2 * 4 * 100, "neither the sine nor the cosine, which have no place but in the squares"


def test_nothing_is_recomputed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no gradient is wanted")

    monkeypatch.setattr("megatron_core_impl.models.transformer.checkpoint", refuse)
    monkeypatch.setattr("megatron_core_impl.layers.recompute.saved_tensors_hooks", refuse)
    for mode in MODES:
        with torch.no_grad():
            model_of(LLAMA, mode).forward_chunk(0, None, micro_batches(LLAMA, 1)[0])
