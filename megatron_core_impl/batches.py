"""From samples to the micro batches of a step: which samples, how they are padded, and how they get to the device.

Every rank makes its own, from the samples and how many were consumed: those of a tp and of a pp group the same, each dp rank
its part of the global batch. Nothing is sent. They are made on the host, by a thread, while a step computes (`prefetch`).

Rows of a global batch have one width: the longest of them on any rank, rounded up so that tp shares them out, and at most
`sequence_length`. So text always has that, and conversations that are not packed no more padding than a step needs.
"""

from collections.abc import Iterator, Sequence
from math import gcd, lcm

import numpy as np
import torch

from megatron_core_impl.data.sampler import step_samples
from megatron_core_impl.data.samples import EMPTY_ROW, HostBatch, Samples, collate
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import MicroBatch
from megatron_core_impl.train_config import Job, TrainConfig

WIDTH_UNIT = 16  # tokens


def training_batches(samples: Samples, job: Job, mesh: Mesh, consumed_samples: int) -> Iterator[list[MicroBatch]]:
    """This replica's micro batches of each step from a number of samples on to the end of training, on the host."""
    config = job.config
    while consumed_samples < config.samples:
        size = config.batches.size_at(consumed_samples)
        yield micro_batches(samples, consumed_samples, size, job, mesh)
        consumed_samples += size


def evaluation_batches(samples: Samples, job: Job, mesh: Mesh) -> Iterator[list[MicroBatch]]:
    """The same of an evaluation: of the first `eval_samples`, or all there are. Empty rows fill the last micro batches."""
    config = job.config
    count, unit = min(config.eval_samples, len(samples)), config.micro_batch_size * mesh.layout.dp
    for first in range(0, count, config.global_batch_size):
        size = min(config.global_batch_size, count - first)
        yield micro_batches(samples, first, -(-size // unit) * unit, job, mesh, end=count)


def micro_batches(
    samples: Samples, first_sample: int, batch_size: int, job: Job, mesh: Mesh, *, end: int | None = None
) -> list[MicroBatch]:
    """This replica's micro batches of the global batch of `batch_size` samples that begins at a sample, on the host.

    Args:
        end: from this sample on rows are empty; default: the last one.

    Raises:
        ValueError: a sample has an id that the model does not have.
    """
    config, end = job.config, len(samples) if end is None else end
    numbers = step_samples(first_sample, batch_size, config.micro_batch_size, mesh.layout.dp, mesh.dp_rank)
    longest = max(samples.length(k) for k in range(first_sample, min(first_sample + batch_size, end)))
    width = width_of(longest, config, mesh.layout.tp)
    made = []
    for some in numbers:
        batch = collate([samples[k] if k < end else EMPTY_ROW for k in some], width)
        if max(ids.view(np.uint64).max() for ids in (batch.tokens, batch.labels)) >= job.model.vocab_size:  # or below 0
            raise _unknown_id(samples, [k for k in some if k < end], job.model.vocab_size)
        made.append(_on_host(batch, config, mesh.device))
    return made


def _unknown_id(samples: Samples, numbers: Sequence[int], vocab_size: int) -> ValueError:
    """Which document of some samples has an id that the model does not have."""
    for k in numbers:
        dataset, documents = samples.documents(k)
        for document in documents:
            ids = dataset[document].astype(np.int64)
            if len(wrong := ids[(ids < 0) | (ids >= vocab_size)]):
                return ValueError(
                    f"{dataset.prefix}: document {document:,} has token id {wrong[0]:,}, which the model does not have: its "
                    f"vocab_size is {vocab_size:,}. Preprocess the data with the tokenizer of this model"
                )
    raise AssertionError("the id is in none of the documents")


def width_of(longest: int, config: TrainConfig, tp: int) -> int:
    """The width of rows of which the longest has so many tokens."""
    unit = lcm(WIDTH_UNIT, tp // gcd(tp, config.micro_batch_size))
    return min(config.sequence_length, -(-longest // unit) * unit)


def _on_host(batch: HostBatch, config: TrainConfig, device: torch.device) -> MicroBatch:
    """A batch as tensors, for a GPU in memory that it can copy from by itself."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    weights = torch.from_numpy(batch.weights).to(dtype)
    position_ids, answers = (
        None if values is None else torch.from_numpy(values) for values in (batch.position_ids, batch.answers)
    )
    if device.type == "cuda":
        with torch.cuda.device(device):  # this may be a thread, and a thread begins on the first GPU
            tokens, labels, weights = tokens.pin_memory(), labels.pin_memory(), weights.pin_memory()
            position_ids, answers = (None if values is None else values.pin_memory() for values in (position_ids, answers))
    return MicroBatch(tokens, labels, weights, position_ids, batch.document_lengths, answers)


def on_device(batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Batches of the host, copied. The host does not wait for that."""

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, non_blocking=True)

    return [
        batch._replace(
            tokens=moved(batch.tokens), labels=moved(batch.labels), weights=moved(batch.weights),
            position_ids=None if batch.position_ids is None else moved(batch.position_ids),
            answers=None if batch.answers is None else moved(batch.answers),
        )
        for batch in batches
    ]  # fmt: skip
