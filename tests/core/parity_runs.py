"""Our model against one of transformers', in this process: the same data and probes as the gate has."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hf_models import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parity.compare import compare
from megatron_core_impl.parity.expected import Expected
from megatron_core_impl.parity.figures import Comparison, Part, Reference, compared
from megatron_core_impl.parity.probes import DATA, Batch, probes
from megatron_core_impl.parity.record import Oracle, measure, record


def batches_of(config: ModelConfig, *, count: int = 2, size: int = 2, length: int = 32) -> list[Batch]:
    """Random text of some batches, and the probes."""
    samples = torch.randint(VOCAB, (count, size, length + 1), generator=torch.Generator().manual_seed(5))
    return [*(Batch.of(DATA, some) for some in samples), *probes(samples.flatten(), config, first_added=config.vocab_size)]


def oracle_of(theirs: PreTrainedModel, config: ModelConfig) -> Oracle:
    """A model of transformers as a reference."""

    def logits(batch: Batch) -> Tensor:
        # Always with mask and positions, whatever the batch: what transformers does without them is its own affair.
        result: Tensor = theirs(
            batch.tokens, attention_mask=batch.mask.long(), position_ids=batch.position_ids, use_cache=False
        ).logits
        return result

    return Oracle(theirs, logits, config.num_hidden_layers, families.family_of(config).hf_name)


def group(
    batches: Sequence[Batch], config: ModelConfig, references: Sequence[Reference], parts: Sequence[Part]
) -> dict[str, Comparison]:
    """A comparison for each name of batches."""
    return {
        name: compared(
            name, config.num_hidden_layers, {k: references[k] for k, b in enumerate(batches) if b.name == name}, parts
        )
        for name in dict.fromkeys(batch.name for batch in batches)
    }


def comparisons(theirs: PreTrainedModel, ours: Transformer, batches: Sequence[Batch] | None = None) -> dict[str, Comparison]:
    """Everything that is compared, by name."""
    batches = batches_of(ours.config) if batches is None else batches
    with TemporaryDirectory() as folder:
        expected = Expected(Path(folder))
        references = record(oracle_of(theirs, ours.config), batches, expected)
        return group(batches, ours.config, references, compare(ours, batches, expected))


def roundings(exact: PreTrainedModel, half: PreTrainedModel, config: ModelConfig) -> dict[str, Comparison]:
    """How far a model of transformers is from another, as ours would be compared."""
    batches = batches_of(config)
    with TemporaryDirectory() as folder:
        expected = Expected(Path(folder))
        references = record(oracle_of(exact, config), batches, expected)
        return group(batches, config, references, measure(oracle_of(half, config), batches, expected))
