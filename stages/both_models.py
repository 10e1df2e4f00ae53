"""A model loaded twice, fresh from its files: as ours, and as transformers has it, so that the two can be compared."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_core_impl import parity
from megatron_core_impl.checkpoint.foreign import assemble, invert
from megatron_core_impl.checkpoint.index import read_json
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from stages.contracts import artifacts as a
from stages.runtime import BadInput

Precision = Literal["fp32", "bf16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_ours(model: a.ModelFacts, weights: Path, precision: Precision) -> parity.Side:
    """Our model, alone in this process.

    Raises:
        BadInput: the weights are not those of this model.
    """
    config = ModelConfig(**model.config_fields())
    module = parallelize(config, Mesh.single(_device()), dtype=DTYPES[precision])
    try:
        load_weights(module, open_weights(weights))
    except ValueError as error:
        raise BadInput(f"inputs.weights: {error}") from error
    module.eval()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        padded: torch.Tensor = module(tokens.to(_device()))  # [T, V padded]
        return padded[:, : config.vocab_size]

    return parity.Side("ours", module, logits, config.num_hidden_layers)


def load_transformers(folder: Path, precision: Precision, *, vocab_size: int | None = None) -> parity.Side:
    """The model of a Hugging Face folder, loaded by transformers, which says nothing and asks nobody.

    Args:
        vocab_size: rows that embedding and output layer get; those that the folder lacks become the mean of the others.

    Raises:
        BadInput: transformers cannot load it, or finds no weights for a part of it.
    """
    transformers = quiet_transformers()
    try:
        module, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInput(f"transformers cannot load {folder}: {error}") from error
    # transformers goes on with random numbers where it finds no weights
    if lacking := sorted(str(key) for fault in ("missing_keys", "mismatched_keys") for key in loading[fault]):
        raise BadInput(f"{folder}: has no weights that fit {lacking[0]} ({len(lacking)} such tensors), says transformers")
    config = families.config_from_hf(read_json(folder / "config.json"))
    if vocab_size is not None and vocab_size > config.vocab_size:
        _grow(module, config.vocab_size, vocab_size)
        config = replace(config, vocab_size=vocab_size)
    module = module.eval().to(_device())
    family = families.family_of(config)
    canonical = {stacked.name: stacked for stacked in invert(family.hf_tensors(config))}

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module(tokens.to(_device()), use_cache=False).logits
        return result

    def parameter(name: str) -> torch.Tensor | None:
        return assemble(canonical[name], module.get_parameter) if name in canonical else None

    return parity.Side("transformers", module, logits, config.num_hidden_layers, family.hf_name, parameter)


@torch.no_grad()
def _grow(module: Any, rows: int, wanted: int) -> None:
    """Give a model of transformers rows for added tokens."""
    module.resize_token_embeddings(wanted, mean_resizing=False)
    for layer in (module.get_input_embeddings(), module.get_output_embeddings()):
        layer.weight[rows:] = layer.weight[:rows].mean(0, dtype=torch.float64).to(layer.weight.dtype)


def quiet_transformers() -> Any:
    """The transformers package, without its warnings and progress bars. Imported late: it takes seconds."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
