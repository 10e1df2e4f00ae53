"""What an evaluation counts: against the logits of transformers, over any layout, and never as a mean of means."""

import math
from collections.abc import Sequence

import hf_models
import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.layers import blocks
from megatron_core_impl.layers.cross_entropy import loss_and_hits
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.metrics import Sums, total
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.train_step import measure, measure_sums


def with_hits(batch: MicroBatch, likeliest: Tensor) -> MicroBatch:
    """A batch half of whose labels are what the model finds likeliest, with weights of all kinds, and answers."""
    generator = torch.Generator().manual_seed(5)
    shape = batch.tokens.shape
    labels = likeliest.view(shape).where(torch.rand(shape, generator=generator) < 0.5, batch.labels.clamp_min(0))
    weights = torch.tensor([0.0, 0.1, 1.0, 2.0], dtype=torch.float64)[torch.randint(4, shape, generator=generator)]
    answers = torch.rand(shape, generator=generator) < 0.4
    return batch._replace(labels=labels, weights=weights, answers=answers)


def by_definition(logits: Tensor, batch: MicroBatch) -> Sums:
    """From logits [B, S, V]."""
    assert batch.answers is not None
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    hits, counted = logits.argmax(-1) == batch.labels, batch.weights != 0
    masks = (counted, counted & hits, counted & batch.answers, counted & batch.answers & hits)
    return Sums(float(losses @ batch.weights.flatten()), float(batch.weights.sum()), *(int(mask.sum()) for mask in masks))


def test_they_are_those_of_transformers() -> None:
    theirs = hf_models.random_model("llama").double()
    ours = hf_models.ours_of(theirs, torch.float64)
    tokens = torch.randint(hf_models.VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens).logits
    batch = with_hits(MicroBatch(tokens, tokens, tokens), logits.argmax(-1))
    got, want = measure_sums(Pipeline(ours), [batch]), by_definition(logits, batch)
    assert tuple(got) == pytest.approx(tuple(want), rel=1e-6)  # transformers rotates in single precision
    assert 0 < want.answer_correct < min(want.answer_tokens, want.correct)
    assert want.correct < want.tokens < tokens.numel()
    text = measure_sums(Pipeline(ours), [batch._replace(answers=None)])
    assert tuple(text) == pytest.approx((*want[:4], 0, 0), rel=1e-6)


def test_weights_may_add_up_to_less_than_one() -> None:
    model = tiny.loaded(tiny.GROUPED, Mesh.single(), tiny.random_weights(tiny.GROUPED))
    (batch, *_) = tiny.micro_batches(tiny.GROUPED, 0)
    weights = torch.zeros_like(batch.weights)
    weights[0, 3], weights[1, 5] = 0.25, 0.125
    batch = batch._replace(weights=weights, labels=batch.labels.clamp_min(0))
    sums = measure_sums(Pipeline(model), [batch])
    assert (sums.weight, sums.tokens) == (0.375, 2)
    for by_micro_batch in (False, True):
        assert measure(Pipeline(model), [batch], by_micro_batch=by_micro_batch).loss == pytest.approx(sums.mean_loss, rel=1e-12)


def batches_of(config: ModelConfig, model: Transformer) -> list[MicroBatch]:
    batches = []
    for batch in tiny.micro_batches(config, 0):
        with torch.no_grad():
            likeliest = model(batch.tokens)[:, : config.vocab_size].argmax(-1)
        batches.append(with_hits(batch, likeliest))
    return batches


def sums_on_rank(config: ModelConfig, layout: Layout, batches: Sequence[MicroBatch]) -> Sums:
    mesh = init_mesh(layout, "cpu", kv_replicas=layout.kv_replicas(config))
    model = tiny.loaded(config, mesh, tiny.random_weights(config))
    return measure_sums(Pipeline(model), list(batches[mesh.dp_rank :: layout.dp]))


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.TIED], ids=["padded", "tied-none-real"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=["tp", "pp", "dp"])
def test_over_two_ranks(pool: GlooPool, config: ModelConfig, layout: Layout) -> None:
    model = tiny.loaded(config, Mesh.single(), tiny.random_weights(config))
    batches = batches_of(config, model)
    with torch.no_grad():
        logits = [model(batch.tokens)[:, : config.vocab_size].view(*batch.tokens.shape, -1) for batch in batches]
    want = total(by_definition(*pair) for pair in zip(logits, batches, strict=True))
    for got in pool.run(sums_on_rank, 2, config, layout, batches):
        assert tuple(got) == pytest.approx(tuple(want), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_padding_are_never_the_likeliest(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 16)  # two tokens at a time
    weight = torch.zeros(8, 1, dtype=dtype)
    weight[:3, 0] = torch.tensor([-1.0, -2.0, -3.0])  # padding would have logit 0
    x, labels = torch.ones(5, 1, dtype=dtype), torch.tensor([0, 1, 0, 2, 0])
    _, hits = loss_and_hits(x, ShardedParameter(weight), labels, torch.ones(5), 3, None)
    assert hits.tolist() == [True, False, True, False, True]


def test_metrics_are_over_tokens() -> None:
    few, many = Sums(5.0, 0.5, 1, 1, 1, 1), Sums(4.0, 2.0, 4, 1, 3, 0)
    both = total([few, many])
    assert both == Sums(9.0, 2.5, 5, 2, 4, 1)
    assert both.metrics() == pytest.approx({
        "loss": 3.6, "perplexity": math.exp(3.6), "accuracy": 0.4, "loss_tokens": 5, "instruct_accuracy": 0.25,
        "answer_tokens": 4,
    })  # fmt: skip
    assert set(Sums(1.0, 1.0, 1, 1).metrics()) == {"loss", "perplexity", "accuracy", "loss_tokens"}
    assert all(math.isnan(Sums().metrics()[name]) for name in ("loss", "perplexity", "accuracy"))
    assert math.isnan(Sums().instruct_accuracy)
