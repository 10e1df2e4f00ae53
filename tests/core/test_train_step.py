"""A single step: which tokens count how much, what documents do, and that nothing comes of nothing."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from distributed import GlooPool
from tiny_job import changed, make_job
from tiny_training import MODEL
from torch import Tensor

from megatron_core_impl.batches import micro_batches
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout
from megatron_core_impl.data.gpt_dataset import TextSamples
from megatron_core_impl.loss_scale import StaticLossScale
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.metrics import Report
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.zero import ZeroOptimizer
from megatron_core_impl.resume import begin
from megatron_core_impl.train_config import Job, Rates
from megatron_core_impl.train_step import StepResult, measure, train_step

LR = Rates(lr=0.1, weight_decay=0.0)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return changed(make_job(tmp_path), weight_decay=0.0, clip_grad=0.0, optimizer="sgd", momentum=0.0)


class Trained(NamedTuple):
    result: StepResult
    weights: dict[str, Tensor]


def start(job: Job, mesh: Mesh) -> tuple[Transformer, ZeroOptimizer]:
    return begin(job, mesh, Report())[:2]


def batches_of(job: Job, counting: list[list[int]], mesh: Mesh, weight: float = 1.0) -> list[MicroBatch]:
    """A rank's micro batches of two samples of 16 tokens, of each of which only the first `counting` tokens count."""
    made = []
    for number in range(mesh.dp_rank, len(counting), mesh.layout.dp):
        random = np.random.RandomState(number)
        ids = torch.from_numpy(random.randint(0, MODEL.vocab_size, (2, 17)))
        weights = torch.zeros(2, 16, dtype=torch.float64)
        for row, count in enumerate(counting[number]):
            weights[row, :count] = weight
        made.append(MicroBatch(ids[:, :-1], ids[:, 1:].contiguous(), weights))
    return made


def step_on_rank(job: Job, layout: Layout, counting: list[list[int]], by_micro_batch: bool) -> Trained:
    mesh = init_mesh(layout, "cpu")
    return step_on_mesh(job, mesh, counting, by_micro_batch)


def step_on_mesh(job: Job, mesh: Mesh, counting: list[list[int]], by_micro_batch: bool) -> Trained:
    model, optimizer = start(job, mesh)
    batches = batches_of(job, counting, mesh)
    pipeline = Pipeline(model)
    before = measure(pipeline, batches, by_micro_batch=by_micro_batch)
    result = train_step(pipeline, optimizer, batches, LR, StaticLossScale(), by_micro_batch=by_micro_batch)
    assert result[:3] == pytest.approx(before[:3], rel=1e-12), "both compute the same loss"
    optimizer.wait_for_weights()
    return Trained(result, {name: p.detach().clone() for name, p in model.sharded_parameters().items()})


COUNTING = [[16, 3], [0, 0], [5, 0], [1, 1]]  # micro batches of one, of no, and of both kinds of samples


def by_definition(job: Job, by_micro_batch: bool) -> tuple[float, float]:
    """Loss and gradient norm from logits."""
    model = parallelize(job.model, Mesh.single(), dtype=torch.float64)
    load_weights(model, open_weights(job.weights))
    sums, counts = [], []
    for batch in batches_of(job, COUNTING, Mesh.single()):
        losses = F.cross_entropy(model(batch.tokens)[:, : MODEL.vocab_size], batch.labels.reshape(-1), reduction="none")
        sums.append((losses * batch.weights.reshape(-1)).sum())
        counts.append(float(batch.weights.sum()))
    if by_micro_batch:
        loss = torch.stack([total / max(count, 1) for total, count in zip(sums, counts, strict=True)]).mean()
    else:
        loss = torch.stack(sums).sum() / sum(counts)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), float(torch.stack([(grad**2).sum() for grad in grads]).sum().sqrt())


@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_what_a_token_counts(job: Job, pool: GlooPool, by_micro_batch: bool) -> None:
    """As a share of all tokens, or as the reference has it; a rank, or a micro batch, without any is nothing special."""
    loss, norm = by_definition(job, by_micro_batch)
    alone = step_on_mesh(job, Mesh.single(), COUNTING, by_micro_batch)
    for layout in (Layout(dp=2), Layout(pp=2)):
        for trained in pool.run(step_on_rank, 2, job, layout, COUNTING, by_micro_batch):
            for name, values in trained.weights.items():
                torch.testing.assert_close(values, alone.weights[name], rtol=0, atol=1e-12, msg=name)
            assert trained.result == pytest.approx(alone.result, rel=1e-10)
    assert alone.result == pytest.approx((loss, 26, 26, norm), rel=1e-10)


@pytest.mark.parametrize("weight", [1e-3, 0.4, 1e30])
def test_weights_are_no_number_of_tokens(job: Job, pool: GlooPool, weight: float) -> None:
    """A weight that all tokens have changes neither the loss nor how many they are, only what the loss is divided by."""
    loss, norm = by_definition(job, False)
    alone = weighed_on_mesh(job, Mesh.single(), weight)
    assert alone == pytest.approx((loss, 26 * weight, 26, norm), rel=1e-10)
    for layout in (Layout(dp=2), Layout(pp=2)):
        for result in pool.run(weighed_on_rank, 2, job, layout, weight):
            assert result == pytest.approx(alone, rel=1e-10)
            assert result.tokens == 26


def weighed_on_rank(job: Job, layout: Layout, weight: float) -> StepResult:
    return weighed_on_mesh(job, init_mesh(layout, "cpu"), weight)


def weighed_on_mesh(job: Job, mesh: Mesh, weight: float) -> StepResult:
    model, optimizer = start(job, mesh)
    return train_step(Pipeline(model), optimizer, batches_of(job, COUNTING, mesh, weight), LR, StaticLossScale())


def test_the_two_differ(job: Job) -> None:
    assert abs(by_definition(job, True)[0] - by_definition(job, False)[0]) > 0.1


def test_a_batch_without_targets_changes_nothing(job: Job) -> None:
    model, optimizer = start(job, Mesh.single())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = batches_of(job, [[0, 0], [0, 0]], Mesh.single())
    for by_micro_batch in (False, True):
        result = train_step(Pipeline(model), optimizer, batches, LR, StaticLossScale(), by_micro_batch=by_micro_batch)
        assert result == (0.0, 0.0, 0, 0.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def samples(job: Job) -> TextSamples:
    """Eight samples in which many documents end."""
    random = np.random.RandomState(3)
    data: Any = Rows(random.randint(0, 8, 17) for _ in range(8))
    config = job.config
    return TextSamples(data, 2, config.reset_position_ids, config.reset_attention_mask, config.eod_mask_loss)


class Rows(list[npt.NDArray[np.int64]]):
    sequence_length = 16


def test_documents_stand_for_themselves(job: Job) -> None:
    """With all three settings, the loss is that of every document alone, without what follows its end."""
    eod = 2
    job = changed(job, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    model, _ = start(job, Mesh.single())
    batches = micro_batches(samples(job), 0, 8, job, Mesh.single())
    losses, documents = [], 0
    for batch in batches:
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            ends = [i + 1 for i, token in enumerate(tokens) if token == eod and i + 1 < len(tokens)] + [len(tokens)]
            for first, last in zip([0, *ends], ends, strict=False):
                documents += 1
                logits = model(torch.tensor([tokens[first:last]]))[:, : MODEL.vocab_size]
                found = F.cross_entropy(logits, torch.tensor(labels[first:last]), reduction="none")
                losses += [loss for loss, token in zip(found.tolist(), tokens[first:last], strict=True) if token != eod]
    assert documents > 8
    result = measure(Pipeline(model), batches)
    assert result[:3] == pytest.approx((sum(losses) / len(losses), len(losses), len(losses)), rel=1e-12)


@pytest.mark.parametrize("name", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_each_of_them_matters(job: Job, name: str) -> None:
    model, _ = start(job, Mesh.single())
    plain, changes = (
        measure(Pipeline(model), micro_batches(samples(one), 0, 8, one, Mesh.single()))
        for one in (job, changed(job, **{name: True}))
    )
    assert abs(plain.loss - changes.loss) > 1e-4
    assert (plain.tokens == changes.tokens) == (name != "eod_mask_loss")
