"""Dropout: what is zeroed, how much of it, when, and that a step draws the same numbers however often it is run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from activations import CONFIGS, DROPOUT, LLAMA, MODES, NONE, micro_batches, mode_name, model_of
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.config import Dropout, Layout, ModelConfig
from megatron_core_impl.layers.attention import Sequences, attend
from megatron_core_impl.layers.rope import frequencies, rotation
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.random import seed_step


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor]]:
    """The shares and the masks (True is kept) of all hidden states, in the order in which they are drawn."""
    drawn: list[tuple[float, Tensor]] = []

    def record(x: Tensor, share: float, train: bool) -> tuple[Tensor, Tensor]:
        result, mask = dropout(x, share, train)
        drawn.append((share, mask))
        return result, mask

    dropout = torch.native_dropout
    monkeypatch.setattr(torch, "native_dropout", record)
    return drawn


def test_shares_of_all_layers(masks: list[tuple[float, Tensor]]) -> None:
    model, batch = model_of(LLAMA, NONE, dropout=Dropout(hidden=0.25)), micro_batches(LLAMA, 1, length=500)[0]
    inputs: list[Tensor] = []
    model.model.layers["0"].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.forward_chunk(0, None, batch)
    assert [share for share, _ in masks] == [0.25] * 7, "embeddings, and per layer what attention and MLP add"
    embedded = model.model.embed_tokens(batch.tokens.flatten())
    torch.testing.assert_close(inputs[0], torch.where(masks[0][1], embedded / 0.75, 0.0))
    for _, mask in masks:
        assert 1 - float(mask.double().mean()) == pytest.approx(0.25, abs=0.01)  # 24,000 numbers: σ = 0.003
        assert mask.double().mean(1).std() < 0.15, "numbers are zeroed one by one, not token by token"
        assert mask.double().mean(0).std() < 0.05, "nor feature by feature"


def test_lima_shares(masks: list[tuple[float, Tensor]]) -> None:
    """From nothing in the first layer to all of it in the last; nothing of the embeddings."""
    dropout = Dropout(hidden=0.3, lima=True)
    model_of(LLAMA, NONE, dropout=dropout).forward_chunk(0, None, micro_batches(LLAMA, 1)[0])
    assert [share for share, _ in masks] == pytest.approx([0.15, 0.15, 0.3, 0.3])
    # a layer's share is that of its number in the whole model, wherever it lies
    masks.clear()
    mesh = replace(Mesh.single(), layout=Layout(pp=3), pp_rank=1)
    model_of(LLAMA, NONE, dropout=dropout, mesh=mesh).forward_chunk(0, torch.randn(16, 24), micro_batches(LLAMA, 1)[0])
    assert [share for share, _ in masks] == pytest.approx([0.15, 0.15])


def test_a_parallel_layer_drops_the_sum_of_attention_and_mlp_once(masks: list[tuple[float, Tensor]]) -> None:
    for name in ("falcon", "falcon-two-norms"):
        config = CONFIGS[name]
        model_of(config, NONE, dropout=Dropout(hidden=0.1)).forward_chunk(0, None, micro_batches(config, 1)[0])
        assert len(masks) == 1 + config.num_hidden_layers
        masks.clear()


def test_attention_weights_are_dropped_and_scaled() -> None:
    """Queries of zero look at all that came before alike, and values that are unit vectors show the weights themselves."""
    length, share = 64, 0.25
    zeros, values = torch.zeros(8, length, 4, length), torch.eye(length).view(1, length, 1, length).expand(8, -1, 4, -1)
    sequences = Sequences(
        8, rotation(torch.arange(length), frequencies(replace(LLAMA, head_dim=length), torch.float32), torch.float32)
    )
    torch.manual_seed(1)
    weights = attend(zeros, zeros, values, sequences, dropout=share).transpose(1, 2)  # [B, N, queries, keys]
    before = torch.ones(length, length).tril().bool()
    plain = (1 / torch.arange(1.0, length + 1)).unsqueeze(1) / (1 - share)
    assert not weights[..., ~before].any()
    is_kept = weights != 0
    torch.testing.assert_close(weights, torch.where(is_kept, plain, 0.0))
    assert float(is_kept[..., before].double().mean()) == pytest.approx(1 - share, abs=0.01)
    assert not torch.equal(is_kept[0], is_kept[1])
    assert not torch.equal(is_kept[0, 0], is_kept[0, 1]), "heads have masks of their own"


@pytest.mark.parametrize("dropout", [Dropout(hidden=0.3), Dropout(attention=0.3)], ids=["hidden", "attention"])
def test_only_in_training(dropout: Dropout) -> None:
    tokens = micro_batches(LLAMA, 1)[0].tokens
    plain = model_of(LLAMA, NONE).eval()(tokens)
    model = model_of(LLAMA, NONE, dropout=dropout)
    assert not torch.equal(model(tokens), plain)
    assert torch.equal(model.eval()(tokens), plain)


def losses_of_step(model: Transformer, step: int, count: int = 1, number_of_batches: int = 1) -> list[float]:
    seed_step(7, step, model.mesh)
    batches = micro_batches(model.config, number_of_batches)
    return [model.forward_chunk(0, None, batch).item() for batch in batches for _ in range(count)]


def test_a_step_draws_the_same_numbers_whenever_it_is_run() -> None:
    model = model_of(LLAMA, NONE, dropout=DROPOUT)
    third = losses_of_step(model, 3, count=2)
    assert third[0] != third[1], "the same tokens twice in one step have two masks"
    others = losses_of_step(model, 2) + losses_of_step(model, 4)
    assert len({*third, *others}) == 4, "steps differ"
    assert losses_of_step(model, 3, count=2) == third, "whatever was drawn before"


def draws(seed: int, step: int, **where: Any) -> tuple[float, ...]:
    seed_step(seed, step, replace(Mesh.single(), **where))
    return tuple(torch.rand(4).tolist())


def test_streams_of_seeds_steps_and_ranks_differ() -> None:
    streams = {draws(seed, step, rank=rank) for seed in (1, 11, 111) for step in (1, 11, 111) for rank in (0, 1, 11)}
    assert len(streams) == 27


def masks_of_rank(config: ModelConfig) -> Tensor:
    """The share of the tokens' features that this rank has dropped, as the mask itself: T·H booleans."""
    mesh = init_mesh(Layout(tp=2), "cpu")
    model = model_of(config, NONE, mesh=mesh, dropout=Dropout(hidden=0.5))
    seed_step(1, 1, mesh)
    seen: list[Tensor] = []
    model.model.layers["0"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] != 0))
    model.forward_chunk(0, None, micro_batches(config, 1)[0])
    return seen[0]


def test_ranks_of_a_tp_group_draw_masks_of_their_own(pool: GlooPool) -> None:
    first, second = pool.run(masks_of_rank, 2, LLAMA)
    assert first.shape == second.shape == (8, 24)  # each half of the tokens
    assert 0.2 < float((first != second).double().mean()) < 0.8


@pytest.mark.parametrize("mode", [NONE, *MODES], ids=mode_name)
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_gradients_with_masks_in_place(name: str, mode: Any) -> None:
    """The slope of the loss in float64 along a random direction, each evaluation with the masks of the same step."""
    config = CONFIGS[name]
    model = model_of(config, mode, dropout=DROPOUT, dtype=torch.float64)
    parameters = list(model.sharded_parameters().values())
    batch = micro_batches(config, 1)[0]
    batch = batch._replace(weights=batch.weights.double())

    def loss() -> Tensor:
        seed_step(1, 1, model.mesh)
        return model.forward_chunk(0, None, batch)

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    step, sides = 1e-6, []
    for sign in (1, -2):
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.add_(direction, alpha=sign * step)
        sides.append(loss().item())
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)
