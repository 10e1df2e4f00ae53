"""Models that Meta or Megatron-LLM stored, taken in as a Hugging Face folder: nothing after `download` knows another form.

Tensor by tensor, a block of rows in memory at a time. The files are pickles, and are read by an interpreter that runs nothing
of them (`checkpoint.restricted_pickle`), so they need no permission. What was written is read back, and every tensor of every
file of the checkpoint is made of it again and compared, bit for bit; only rows that are cut off the vocabulary are not.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint import megatron_llm, meta
from megatron_core_impl.checkpoint.digests import Follower
from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.proven import Advance, NotEqual, Target, write_tensors
from megatron_core_impl.checkpoint.ranks import StoredRank, open_ranks, prove_ranks, up_to
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter
from megatron_core_impl.checkpoint.sharded import count_bytes, open_weights
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.checkpoint.torch_tensors import TorchTensors
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.models import families
from megatron_core_impl.models import megatron_llm as megatron_form
from megatron_core_impl.models import meta as meta_form
from megatron_core_impl.models.forms import Form
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from stages.context import Context
from stages.contracts.model_sources import CONFIG, Kind, describe, stored_rows
from stages.model_files import OTHER_FILES, SAFE, TOKENIZER_FILES, copy_file
from stages.outcomes import BadInput, GateFailed

BESIDE = {"meta": meta.PARAMS, "megatron-llm": megatron_llm.TRACKER, "huggingface": CONFIG}


def take_in(folder: Path, kind: Kind, said: Mapping[str, Any], files: Path, ctx: Context) -> None:
    """Make a Hugging Face folder of a checkpoint.

    Args:
        folder: the checkpoint.
        said: `model.config`.
        files: where the Hugging Face folder is made.

    Raises:
        BadInput: the checkpoint is damaged, incomplete or not supported; the message says what to change.
        GateFailed: what was written is not what the checkpoint holds.
    """
    _copy_files(folder, kind, files)
    try:
        hf = describe(folder, said)
        config = families.config_from_hf(hf)
        if kind == "meta":
            meta.check_listed(folder, ctx.progress)
        rows, ranks = _ranks_of_meta(folder, config) if kind == "meta" else _ranks_of_megatron(folder, config, ctx)
        stored = families.tensors(replace(config, vocab_size=rows))
        for rank in ranks:
            if isinstance(rank.file, TorchTensors) and not rank.file.has_checksums:
                ctx.warn(f"{rank.name} was written without checksums: damage of its numbers would not be found")
        source = open_ranks(folder, {spec.name: spec.shape for spec in stored}, ranks)
        _write(source, config, files, ctx)
        written = Rearranged(open_weights(files), invert(families.family_of(config).hf_tensors(config)))
        prove_ranks(written, [up_to(rank, (EMBEDDING, HEAD), config.vocab_size) for rank in ranks], ctx.progress)
    except NotEqual as error:
        raise GateFailed(f"model.source: {error}") from error
    except ValueError as error:
        raise BadInput(f"model.source: {error}") from error
    dtype = source.dtype(source.names[0]).name
    (files / CONFIG).write_text(json.dumps({**hf, "torch_dtype": dtype, **_special_ids(files)}, indent=2) + "\n")


def _ranks_of_meta(folder: Path, config: ModelConfig) -> tuple[int, list[StoredRank]]:
    """The rows of the vocabulary that a checkpoint of Meta stores, and its files."""
    shards = meta.open_shards(folder)
    shapes = {name: record.shape for name, record in shards[0][1].items()}
    rows = shapes["output.weight"][0] * len(shards)
    return rows, [
        StoredRank(
            archive.path.name, TorchTensors(archive, records), meta_form.stored_by(config, rows, shapes, len(shards), shard)
        )
        for shard, (archive, records) in enumerate(shards)
    ]


def _ranks_of_megatron(folder: Path, config: ModelConfig, ctx: Context) -> tuple[int, list[StoredRank]]:
    """The rows of the vocabulary that a checkpoint of Megatron-LLM stores, padding included, and its files."""
    checkpoint = megatron_llm.open_checkpoint(folder)
    rows = stored_rows(checkpoint)
    if megatron_form.is_resharded(checkpoint.args):
        ctx.warn(
            f"{checkpoint.folder} was written by Megatron-LLM's checkpoint_util, which keeps neither the base nor the scaling "
            f"of the rotary embedding, nor the norms' epsilon, nor the window. Taken: rope_theta={config.rope_theta:g}, "
            f"rope_scaling={config.rope_scaling}, epsilon {config.norm_eps:g}, sliding_window={config.sliding_window}. If the "
            "model was trained with others, say so in model.config"
        )
    return rows, [
        StoredRank(
            file.name,
            TorchTensors(file.archive, file.tensors),
            megatron_form.stored_by(config, rows, checkpoint.layout, file.pp_rank, file.tp_rank, file.chunk),
        )
        for file in checkpoint.files
    ]


def _write(source: WeightsSource, config: ModelConfig, files: Path, ctx: Context) -> None:
    """Write the tensors of a Hugging Face model."""
    kept = Rearranged(source, Form().table(families.tensors(config)))  # cuts rows off the vocabulary where fewer are wanted
    reader = Rearranged(kept, families.family_of(config).hf_tensors(config))
    entries = [(name, reader.dtype(name), reader.shape(name)) for name in reader.names]
    advance = Advance(ctx.progress, count_bytes(reader, reader.names))
    with Follower() as follower, SafetensorsWriter(files / SAFE[0], entries, {"format": "pt"}, follower) as writer:
        target = Target(writer, {name: whole(reader.shape(name)) for name in reader.names})
        write_tensors([target], reader, None, advance, open_weights(files), follower)


def _copy_files(folder: Path, kind: Kind, files: Path) -> None:
    """Copy the tokenizer, the licence and the card, which lie beside the checkpoint."""
    places = [folder] if kind == "meta" or (folder / megatron_llm.TRACKER).exists() else [folder.parent, folder]
    found = {path.name: path for place in places for path in place.iterdir() if path.is_file()}
    if not found.keys() & {"tokenizer.model", "tokenizer.json"}:
        beside = f"beside {BESIDE[kind]}"
        raise BadInput(
            f"model.source: {folder} has no tokenizer: put the model's tokenizer.model, or tokenizer.json and its other files, "
            f"into {places[0]}, {beside}"
        )
    for name, path in found.items():
        if name in TOKENIZER_FILES or OTHER_FILES.fullmatch(name):
            copy_file(path, files / name)


def _special_ids(files: Path) -> dict[str, int]:
    """What config.json says of the tokenizer: transformers would take Llama's ids, or Falcon's."""
    try:
        tokenizer = load_tokenizer(files)
    except ValueError as error:
        raise BadInput(f"model.source: its tokenizer cannot be read: {error}") from error
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id}
    return {name: number for name, number in ids.items() if number is not None}
