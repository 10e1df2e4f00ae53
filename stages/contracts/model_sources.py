"""What kind of checkpoint a local folder is, and the config.json of those that have none of their own. No torch in here."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_core_impl.checkpoint import megatron_llm, meta
from megatron_core_impl.checkpoint.dtypes import Dtype
from megatron_core_impl.checkpoint.restricted_pickle import RefusedPickle
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsReader
from megatron_core_impl.json_files import read_json
from megatron_core_impl.models import families
from megatron_core_impl.models import megatron_llm as megatron_form
from megatron_core_impl.models import meta as meta_form

Kind = Literal["huggingface", "meta", "megatron-llm"]
CONFIG = "config.json"
CONFIG_IS_THERE = f"model.config is for checkpoints of Meta and Megatron-LLM, and this model has a {CONFIG}"


def kind_of(folder: Path) -> Kind:
    """The kind of a folder: Hugging Face's, unless it is Meta's or Megatron-LLM's and has no config.json.

    Raises:
        ValueError: it has a config.json, and no other weights than Meta's or Megatron-LLM's.
    """
    names = {path.name for path in folder.iterdir()}
    kind: Kind = (
        "megatron-llm" if megatron_llm.is_checkpoint(folder) else "meta" if meta.is_checkpoint(names) else "huggingface"
    )
    if kind == "huggingface" or CONFIG not in names:
        return kind
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        owner = "Meta" if kind == "meta" else "Megatron-LLM"
        raise ValueError(
            f"{folder} holds a checkpoint of {owner}, and a {CONFIG}, but no weights of Hugging Face. To import the "
            f"checkpoint, remove {CONFIG} from there; what the checkpoint does not tell, model.config does"
        )
    return "huggingface"


def describe(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model in a folder: its own, or made of what Meta's or Megatron-LLM's checkpoint says.

    Args:
        said: `model.config`, what the person says of a checkpoint that has no config.json.

    Raises:
        FileNotFoundError: it has no config.json, and is none of the others.
        ValueError: the checkpoint is damaged or not supported, or lacks something; the message names it.
    """
    kind = kind_of(folder)
    if kind == "huggingface":
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(folder / CONFIG)
        hf = read_json(folder / CONFIG)
        if said:
            raise ValueError(f"{CONFIG_IS_THERE}: change it there")
        return hf
    if kind == "meta":
        shards = meta.open_shards(folder)
        shapes = {name: record.shape for name, record in shards[0][1].items()}
        params = meta.read_params(folder)
        made = meta_form.hf_from_params(params, shapes, len(shards))
        check_names(made, said)
        meta_form.check_said(params, said)
        return with_said(made, said)
    checkpoint = megatron_llm.open_checkpoint(folder)
    return with_said(megatron_form.hf_from_args(checkpoint.args, stored_rows(checkpoint), said), said)


def stored_tensors(folder: Path) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Precision and shape of the tensors in a folder's safetensors files, from their headers.

    Raises:
        WeightsError: a file is no intact safetensors file.
    """
    files = (SafetensorsReader(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.tensors.items()}


def stored_rows(checkpoint: megatron_llm.Checkpoint) -> int:
    """Rows of the embedding that a checkpoint of Megatron-LLM stores, padding included."""
    name = megatron_llm.EMBEDDING
    record = checkpoint.files[0].tensors.get(name)
    if record is None or not record.shape:
        raise RefusedPickle(f"{checkpoint.files[0].archive.path}: has no embedding")
    return record.shape[0] * checkpoint.layout.tp


def check_names(made: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse what the person says of a field that a configuration does not have.

    Raises:
        ValueError: naming it, and what may have been meant.
    """
    for name in said:
        if name not in made:
            near = difflib.get_close_matches(name, made, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It has: {', '.join(sorted(made))}"
            raise ValueError(f"model.config.{name}: the config.json of this checkpoint has no such field. {hint}")


def with_said(made: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what the person says of it.

    Raises:
        ValueError: they name a field that it does not have, or more of the vocabulary than is stored.
    """
    check_names(made, said)
    hf = {**made, **said}
    families.config_from_hf(hf)
    if hf["vocab_size"] > made["vocab_size"]:
        raise ValueError(f"model.config.vocab_size: {hf['vocab_size']} exceeds the {made['vocab_size']} rows that are stored")
    return hf
