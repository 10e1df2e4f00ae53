"""The families of models, by the `model_type` of their `config.json`. No torch in here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_core_impl.config import ModelConfig, StackedTensor
from megatron_core_impl.models import falcon, llama, mistral, qwen2
from megatron_core_impl.models.forms import Form
from megatron_core_impl.models.hf_config import LLAMA_FIELDS
from megatron_core_impl.models.tensors import EMBEDDING, count_parameters, tensors
from megatron_core_impl.shown import shown

__all__ = ["FAMILIES", "Family", "check_stored", "config_from_hf", "count_parameters", "family_of", "hf_shapes", "tensors"]


@dataclass(frozen=True)
class Family:
    """What differs between the families. The defaults are those of a Llama-like one."""

    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    # How Hugging Face stores the canonical tensors
    hf_form: Callable[[ModelConfig], Form] = lambda _: Form()
    # transformers' name of a module with a canonical one
    hf_name: Callable[[str], str] = str
    # ModelConfig's word -> config.json's, where they differ
    hf_fields: Mapping[str, str] = field(default_factory=lambda: LLAMA_FIELDS)

    def hf_tensors(self, config: ModelConfig) -> list[StackedTensor]:
        """The tensors that Hugging Face stores for a model, made of the canonical ones."""
        return self.hf_form(config).table(tensors(config))


FAMILIES = {
    "falcon": Family(falcon.config_from_hf, falcon.hf_form, falcon.hf_name, falcon.FIELDS),
    "llama": Family(llama.config_from_hf),
    "mistral": Family(mistral.config_from_hf),
    "qwen2": Family(qwen2.config_from_hf),
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
        ValueError: its family or one of its fields is not supported; the message names it.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={shown(model_type)} is not supported. Supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type].config_from_hf(hf)


def check_stored(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse sizes that are not those of the stored tensors: before anything is built that is as large as they say.

    Args:
        shapes: of the tensors as Hugging Face stores them, from the headers of the files.

    Raises:
        ValueError: naming the field, what it says, and what is stored.
    """
    form, in_file = family_of(config).hf_form(config), family_of(config).hf_fields
    layer = re.compile(rf"{re.escape(form.name('model.layers'))}\.(\d+)\.")
    layers = len({found[1] for name in shapes if (found := layer.match(name))})
    if config.num_hidden_layers != layers and (layers or config.num_hidden_layers > len(shapes)):
        raise ValueError(f"config.json: num_hidden_layers={config.num_hidden_layers}, and the weights hold {layers} layers")
    embedding = form.name(EMBEDDING)
    if len(stored := shapes.get(embedding, ())) == 2:
        for field, size in zip(("vocab_size", "hidden_size"), stored, strict=True):
            if (says := getattr(config, field)) != size:
                raise ValueError(
                    f"config.json: {in_file.get(field, field)}={says}, and the weights hold {size:,}: {embedding} has shape "
                    f"{list(stored)}"
                )


def family_of(config: ModelConfig) -> Family:
    """The family that a model belongs to."""
    return FAMILIES[config.family]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that Hugging Face stores for a model: name -> shape."""
    shapes = {spec.name: spec.shape for spec in tensors(config)}
    return {
        stacked.name: (sum(rows.stop - rows.start for rows in stacked.parts), *shapes[stacked.parts[0].tensor][1:])
        for stacked in family_of(config).hf_tensors(config)
    }
