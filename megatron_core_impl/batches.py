"""The micro batches of a step: which samples, which of their tokens count, where positions begin anew.

Every rank makes its own, from the dataset and the number of samples consumed: those of a tp and of a pp group the same, each dp
rank its part of the global batch. Nothing is sent.

Shapes: B sequences of a micro batch, S tokens of each.
"""

import numpy as np
import torch

from megatron_core_impl.data import masks
from megatron_core_impl.data.gpt_dataset import GPTDataset, split_documents
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.sampler import step_samples
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import MicroBatch
from megatron_core_impl.train_config import Job


def open_datasets(job: Job) -> tuple[GPTDataset, GPTDataset]:
    """The samples of all steps, and those of an evaluation.

    Raises:
        ValueError: one of the two splits holds less than a sample.
    """
    config, data = job.config, IndexedDataset(job.dataset)
    train_documents, valid_documents, _ = split_documents(config.split, len(data))

    def samples(documents: range, num_samples: int) -> GPTDataset:
        return GPTDataset(data, documents, sequence_length=config.sequence_length, num_samples=num_samples, seed=config.seed)

    return samples(train_documents, config.samples), samples(valid_documents, config.eval_batches * config.global_batch_size)


def micro_batches(data: GPTDataset, first_sample: int, batch_size: int, job: Job, mesh: Mesh) -> list[MicroBatch]:
    """This replica's micro batches of the global batch of `batch_size` samples that begins at a sample."""
    numbers = step_samples(first_sample, batch_size, job.config.micro_batch_size, mesh.layout.dp, mesh.dp_rank)
    return [_micro_batch(np.stack([data[k] for k in samples]), job, mesh) for samples in numbers]


def _micro_batch(ids: masks.Tokens, job: Job, mesh: Mesh) -> MicroBatch:
    """[B, S + 1] ids as inputs and labels."""
    config, eod = job.config, job.eod_id
    tokens, labels = ids[:, :-1], ids[:, 1:]
    weights = masks.loss_weights(tokens, eod) if config.eod_mask_loss and eod is not None else np.ones(tokens.shape)
    position_ids = masks.position_ids(tokens, eod) if config.reset_position_ids and eod is not None else None

    def on_device(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(mesh.device, dtype, non_blocking=True)

    return MicroBatch(
        tokens=on_device(tokens, torch.int64),
        labels=on_device(labels, torch.int64),
        weights=on_device(weights, torch.float64 if config.precision == "fp64" else torch.float32),
        position_ids=None if position_ids is None else on_device(position_ids, torch.int64),
        document_lengths=masks.document_lengths(tokens, eod) if config.reset_attention_mask and eod is not None else None,
    )
