"""A model of a few thousand parameters and a dataset it can learn, as files, for the tests of training."""

from pathlib import Path

import numpy as np
import torch
from indexed_writer import IndexedDatasetWriter

from megatron_core_impl.checkpoint.sharded import write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.families import tensors

MODEL = ModelConfig(
    family="llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
)  # fmt: skip


def write_weights(folder: Path, dtype: torch.dtype = torch.float32, model: ModelConfig = MODEL) -> None:
    """Random canonical weights of a model, the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    pieces = []
    for spec in tensors(model):
        values = torch.randn(spec.shape, generator=generator, dtype=torch.float64) * 0.2
        values = values if len(spec.shape) > 1 else 1 + values
        pieces.append((spec.name, spec.shape, whole(spec.shape), values.to(dtype)))
    write_rank_file(folder, 0, pieces)
    write_index(folder, layout={"tp": 1, "pp": 1, "dp": 1})


def write_dataset(folder: Path, documents: int = 40) -> None:
    """Documents that count upwards from a random start, modulo the vocabulary: the next token is easy to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(5)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for _ in range(documents):
            writer.add_sequence((random.randint(MODEL.vocab_size) + np.arange(random.randint(20, 60))) % MODEL.vocab_size)
            writer.end_document()
