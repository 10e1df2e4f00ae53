"""One optimizer update over a global batch, or the loss of one, on any layout.

The weights of the whole global batch are added up before its first forward pass, so every token has its final weight, w / sum,
from the beginning: micro batches, replicas and ranks just add up, and how the batch is cut does not matter. A micro batch, a
rank or a whole batch without any target adds nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_core_impl.collectives import all_reduce_
from megatron_core_impl.loss_scale import LossScale
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Sums
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.zero import ZeroOptimizer
from megatron_core_impl.train_config import Rates


class StepResult(NamedTuple):
    """What became of a step; the same on every rank."""

    loss: float  # mean over the tokens of the global batch that count, each by its weight; 0 where none does
    weight: float  # sum of the weights: what the loss was divided by, but for 0
    tokens: int  # how many count: labels with a weight above 0
    grad_norm: float | None = None  # before clipping; not finite: nothing was updated; None: nothing was meant to be


def train_step(
    pipeline: Pipeline,
    optimizer: ZeroOptimizer,
    batches: Sequence[MicroBatch],
    rates: Rates,
    loss_scale: LossScale,
    *,
    by_micro_batch: bool = False,
) -> StepResult:
    """Update the weights with this replica's micro batches of the global batch. `loss_scale` takes note of how it went.

    Args:
        by_micro_batch: weigh tokens as Megatron-LLM does: the loss is the mean over micro batches of each one's own mean,
            however few of its tokens count. Where all tokens count, that is the mean over tokens.
    """
    scale = loss_scale.scale
    weighed, totals = _weigh(batches, pipeline.model.mesh, by_micro_batch)
    optimizer.begin_step(len(batches))
    share = pipeline.forward_backward(weighed, scale=scale)
    try:
        grad_norm = optimizer.step(rates.lr, weight_decay=rates.weight_decay, loss_scale=scale)
    except FloatingPointError:
        grad_norm = math.nan
    loss_scale.update(math.isfinite(grad_norm))
    return StepResult(*_summed(share, totals, pipeline.model.mesh), grad_norm)


def measure(pipeline: Pipeline, batches: Sequence[MicroBatch], *, by_micro_batch: bool = False) -> StepResult:
    """The loss that `train_step` would have, without dropout; nothing is updated."""
    weighed, totals = _weigh(batches, pipeline.model.mesh, by_micro_batch)
    with _without_dropout(pipeline.model):
        share = pipeline.forward(weighed)
    return StepResult(*_summed(share, totals, pipeline.model.mesh))


def measure_sums(pipeline: Pipeline, batches: Sequence[MicroBatch]) -> Sums:
    """What the metrics of an evaluation are made of, over this global batch; the same on every rank. Nothing is updated.

    Where micro batches do not say which labels are of an answer, as those of text, none is.
    """
    mesh = pipeline.model.mesh
    marked = [
        batch if batch.answers is not None else batch._replace(answers=torch.zeros_like(batch.tokens, dtype=torch.bool))
        for batch in batches
    ]
    with _without_dropout(pipeline.model):
        share = pipeline.forward(marked).expand(3)  # one zero, where this is not the last pp rank
    share = all_reduce_(share.clone(), mesh.pp_group)
    counts = torch.stack([_counts(batch) for batch in marked]).sum(0)
    loss, correct, answers_correct, weight, tokens, answers = all_reduce_(torch.cat((share, counts)), mesh.dp_group).tolist()
    return Sums(loss, weight, int(tokens), int(correct), int(answers), int(answers_correct))


def _counts(batch: MicroBatch) -> Tensor:
    """Of a micro batch: the sum of the weights, how many are above 0, and how many of these are of an answer. [3] in fp64."""
    assert batch.answers is not None
    counts = batch.weights > 0
    return torch.stack((batch.weights.sum(dtype=torch.float64), counts.sum(), (counts & batch.answers).sum()))


def _weigh(batches: Sequence[MicroBatch], mesh: Mesh, by_micro_batch: bool) -> tuple[list[MicroBatch], Tensor]:
    """Micro batches whose losses add up to the loss of the global batch, over all replicas; its weight, and how many count. [2]

    The host does not wait for the numbers.
    """
    weights = torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches])
    tokens = torch.stack([(batch.weights > 0).sum() for batch in batches]).sum()
    totals = all_reduce_(torch.stack([weights.sum(), tokens]), mesh.dp_group)
    divisors = _or_one(weights) * (len(batches) * mesh.layout.dp) if by_micro_batch else _or_one(totals[0]).expand(len(batches))
    weighed = [
        batch._replace(weights=(batch.weights / divisor).to(batch.weights.dtype))
        for batch, divisor in zip(batches, divisors, strict=True)
    ]
    return weighed, totals


def _or_one(totals: Tensor) -> Tensor:
    """1 instead of 0, to divide by. Weights of less than 1 may add up to less than 1."""
    return totals.where(totals > 0, 1)


def _summed(share: Tensor, totals: Tensor, mesh: Mesh) -> tuple[float, float, int]:
    """Loss, weight and tokens of the global batch. A rank's share in its loss is zero on all but the last pp rank."""
    loss = all_reduce_(all_reduce_(share.clone(), mesh.dp_group), mesh.pp_group)
    mean_loss, weight, tokens = torch.cat([loss[None], totals]).tolist()
    return mean_loss, weight, int(tokens)


@contextmanager
def _without_dropout(model: Transformer) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
