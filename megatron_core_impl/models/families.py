"""The families of models, by the `model_type` of their `config.json`. No torch in here."""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

from megatron_core_impl.config import ModelConfig, TensorSpec
from megatron_core_impl.models import llama


class Family(Protocol):
    """What the module of a family offers."""

    def config_from_hf(self, hf: Mapping[str, Any], /) -> ModelConfig: ...

    def tensors(self, config: ModelConfig, /) -> list[TensorSpec]: ...


FAMILIES: dict[str, Family] = {"llama": llama}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
        ValueError: its family or one of its fields is not supported; the message names it.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type].config_from_hf(hf)


def tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of a model: its canonical name, its global shape and how a layout cuts it."""
    return FAMILIES[config.family].tensors(config)


def count_parameters(config: ModelConfig) -> int:
    """Numbers that a model stores; a tied output layer counts once."""
    return sum(prod(spec.shape) for spec in tensors(config))
