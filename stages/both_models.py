"""A model twice, fresh from its files: as ours, and as transformers has it, so that the two can be compared.

Each is loaded whole where memory has room for it, and else layer by layer, while it computes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import ModelConfig, NewRows
from megatron_core_impl.host_memory import available_bytes
from megatron_core_impl.json_files import read_json
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parity.probes import Batch
from megatron_core_impl.parity.record import Oracle
from megatron_core_impl.parity.streaming import load_on_demand, streamed_transformer
from stages.outcomes import BadInput

Precision = Literal["fp32", "bf16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARE = 2**30  # bytes of memory that a model leaves free, for what is computed


# ── Ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_ours(config: ModelConfig, weights: Path, precision: Precision, mesh: Mesh) -> Transformer:
    """This rank's part of our model.

    Raises:
        BadInput: the weights are not those of this model.
    """
    dtype = DTYPES[precision]
    size = families.count_parameters(config) * dtype.itemsize  # of all ranks, which on a CPU share its memory
    try:
        reader = open_weights(weights)
        if has_room(size if mesh.device.type == "cpu" else size // mesh.layout.world_size, mesh.device):
            model = parallelize(config, mesh, dtype=dtype)
            load_weights(model, reader)
        else:
            model = streamed_transformer(config, mesh, dtype=dtype, reader=reader)
    except ValueError as error:
        raise BadInput(f"inputs.weights: {error}") from error
    return model.eval()


# ── transformers' ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_transformers(
    folder: Path, precision: Precision,
    *, vocab_size: int | None = None, new_rows: NewRows = "mean", rounded_to: torch.dtype | None = None,
) -> Oracle:  # fmt: skip
    """The model of a Hugging Face folder, loaded whole by transformers, which says nothing and asks nobody.

    Args:
        vocab_size: rows that embedding and output layer get.
        new_rows: what those begin as that the folder lacks.
        rounded_to: the precision that the weights are rounded to before anything is computed.

    Raises:
        BadInput: transformers cannot load it, or finds no weights for a part of it.
    """
    transformers = quiet_transformers()
    try:
        module, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=rounded_to or DTYPES[precision], attn_implementation="sdpa", local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInput(f"transformers cannot load {folder}: {error}") from error
    # transformers goes on with random numbers where it finds no weights
    if lacking := sorted(str(key) for fault in ("missing_keys", "mismatched_keys") for key in loading[fault]):
        raise BadInput(f"{folder}: has no weights that fit {lacking[0]} ({len(lacking)} such tensors), says transformers")
    config = _config(folder, vocab_size)
    if (stored := module.get_input_embeddings().weight.shape[0]) < config.vocab_size:
        _grow(module, _reader(folder, config, new_rows), config, stored)
    module.eval().to(device())
    for parameter in module.parameters():  # not the buffers: angles stay in fp32
        parameter.data = parameter.data.to(DTYPES[precision])
    return _oracle(module, config)


def stream_transformers(
    folder: Path, precision: Precision,
    *, vocab_size: int | None = None, new_rows: NewRows = "mean", rounded_to: torch.dtype | None = None,
) -> Oracle:  # fmt: skip
    """The same model, which reads its layers from the folder's files while it computes. Arguments as of `load_transformers`.

    Raises:
        BadInput: transformers cannot make it, or the files lack weights for a part of it.
    """
    transformers = quiet_transformers()
    config = _config(folder, vocab_size)
    try:
        hf = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        hf.vocab_size = config.vocab_size
        with _parameters_on_meta():
            module = transformers.AutoModelForCausalLM.from_config(hf, dtype=DTYPES[precision], attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInput(f"transformers cannot make the model of {folder}: {error}") from error
    reader = _reader(folder, config, new_rows)
    needed = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if lacking := sorted(name for name, shape in needed.items() if name not in reader.names or reader.shape(name) != shape):
        raise BadInput(f"{folder}: has no weights that fit {lacking[0]} ({len(lacking)} such tensors), says transformers")
    oracle = _oracle(module.eval(), config)
    layers = module.get_submodule(oracle.own_name("model.layers"))

    def make(name: str, _parameter: nn.Parameter) -> torch.Tensor:
        return reader.read(name, dtype=rounded_to or DTYPES[precision]).to(device(), DTYPES[precision])

    load_on_demand(module, layers.children(), make)
    for part in module.modules():
        part._buffers.update({name: None if buffer is None else buffer.to(device()) for name, buffer in part._buffers.items()})
    return oracle


def oracle_of(
    folder: Path, precision: Precision, *, parameters: int, vocab_size: int, new_rows: NewRows, rounded_to: torch.dtype | None
) -> Oracle:
    """The same model, whole where there is room for it on the host, where transformers loads it, and on the device.

    Args:
        parameters: how many numbers it has. The others are those of `load_transformers`.

    Raises:
        BadInput: as the other two.
    """
    size = parameters * DTYPES[precision].itemsize
    load = load_transformers if has_room(size, torch.device("cpu")) and has_room(size, device()) else stream_transformers
    return load(folder, precision, vocab_size=vocab_size, new_rows=new_rows, rounded_to=rounded_to)


def _config(folder: Path, vocab_size: int | None) -> ModelConfig:
    config = families.config_from_hf(read_json(folder / "config.json"))
    return replace(config, vocab_size=max(config.vocab_size, vocab_size or 0))


def _reader(folder: Path, config: ModelConfig, new_rows: NewRows) -> WeightsSource:
    """The folder's tensors under their own names, with rows for added tokens."""
    own_name = families.family_of(config).hf_name
    return Grown(open_weights(folder, allow_pickle=True), (own_name(EMBEDDING), own_name(HEAD)), config.vocab_size, new_rows)


def _oracle(module: nn.Module, config: ModelConfig) -> Oracle:
    def logits(batch: Batch) -> torch.Tensor:
        arguments: dict[str, Any] = {}
        if not batch.is_plain:
            arguments = {"attention_mask": batch.mask.long(), "position_ids": batch.position_ids}
        if not (is_needed := batch.is_compared.any(0)).all():
            arguments["logits_to_keep"] = is_needed.nonzero()[:, 0]
        arguments = {name: value.to(device()) for name, value in arguments.items()}
        result: torch.Tensor = module(batch.tokens.to(device()), use_cache=False, **arguments).logits
        return result

    return Oracle(module, logits, config.num_hidden_layers, families.family_of(config).hf_name)


@torch.no_grad()
def _grow(module: Any, reader: WeightsSource, config: ModelConfig, stored: int) -> None:
    """Give a model of transformers rows for added tokens."""
    own_name = families.family_of(config).hf_name
    module.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    layers = {EMBEDDING: module.get_input_embeddings(), HEAD: module.get_output_embeddings()}
    for name in (EMBEDDING,) if config.tie_word_embeddings else (EMBEDDING, HEAD):
        weight = layers[name].weight
        weight[stored:] = reader.read(own_name(name), ((stored, len(weight)), (0, weight.shape[1])), weight.dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made meanwhile have their parameters on `meta`, their buffers in earnest."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one comes twice
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def quiet_transformers() -> Any:
    """The transformers package, without its warnings and progress bars. Imported late: it takes seconds."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


# ── Where ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def device() -> torch.device:
    """Where a process that is alone computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_room(size: int, where: torch.device) -> bool:
    """Whether so many bytes of weights fit into memory, and leave room to compute."""
    free = available_bytes() if where.type == "cpu" else torch.cuda.mem_get_info(where)[0]
    return size * 1.1 + SPARE < free
