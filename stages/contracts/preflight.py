"""What can be known to be wrong before any stage starts, because it lies on this disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families, megatron_llm
from stages.contracts import artifacts as a
from stages.contracts import memory, model_sources, publishing, tokenized
from stages.contracts.config import ModelSettings, PipelineConfig
from stages.contracts.train_settings import LayoutSettings


def check(config: PipelineConfig) -> list[str]:
    """Problems of a configuration, one line each, with the key's path. Empty when nothing is known to be wrong.

    Only what is local is looked at: what the Hub holds is known once it is downloaded.
    """
    problems = [*tokenized.problems(config.data)]
    problems += [f"push.{problem}" for problem in [publishing.in_the_way(config.push)] if problem]
    folder = Path(config.model.source).expanduser()
    if not folder.is_dir():
        return problems  # a Hub id
    try:
        model = _local_model(folder, config.model)
    except FileNotFoundError:
        return [
            *problems,
            f"model.source: {folder} has no config.json, so it is no Hugging Face model folder; nor is it Meta's, with "
            "params.json, or Megatron-LLM's, with latest_checkpointed_iteration.txt",
        ]
    except OSError as error:
        return [*problems, f"model.source: {folder}/config.json cannot be read: {error.strerror}"]
    except ValueError as error:
        where = "" if str(error).startswith(str(folder)) else f"{folder}: "
        return [*problems, f"model.source: {where}{error}"]
    problems += _refusals(model, config.layout)
    if (megatron := config.export.megatron_llm) is not None:
        problems += _refusals_of_megatron(model, Layout(tp=megatron.tp, pp=megatron.pp))
    for key, length in (
        ("train.sequence_length", config.train.sequence_length),
        ("verify.sequence_length", config.verify.sequence_length),
    ):
        if length > model.max_position_embeddings:
            problems.append(
                f"{key}: {length} exceeds max_position_embeddings={model.max_position_embeddings} of {config.model.source}"
            )
    return problems


def refused_layout(data: Mapping[str, Any]) -> list[str]:
    """What a local model refuses of the layout of a configuration that is refused for something else; as `check` tells it.

    Args:
        data: a configuration as it was read, of which nothing is known to be legal.
    """
    try:
        settings = ModelSettings.model_validate(data.get("model"))
        layout = LayoutSettings.model_validate(data.get("layout") or {})
        return _refusals(_local_model(Path(settings.source).expanduser(), settings), layout)
    except Exception:  # one of them is not even legal by itself, or no model lies there: told by what reads it
        return []


def memory_of(config: PipelineConfig, downloaded: a.ModelArtifact | None) -> str | None:
    """What each process of the training takes on a GPU, in one line. None where the model is not here yet, or does not fit."""
    folder = Path(config.model.source).expanduser()
    try:
        if downloaded is not None:
            model = ModelConfig(**downloaded.model.config_fields())
        elif folder.is_dir():
            model = _local_model(folder, config.model)
        else:
            return None
        return memory.described(memory.expected(model, config.layout, config.train))
    except (OSError, ValueError):  # `check` has told what is wrong
        return None


def _refusals(model: ModelConfig, layout: LayoutSettings) -> list[str]:
    try:
        layout.layout().check(model)
    except ValueError as error:
        return [f"layout: {error}"]
    return []


def _refusals_of_megatron(model: ModelConfig, layout: Layout) -> list[str]:
    try:
        megatron_llm.check_model(model)
        megatron_llm.check_layout(model, layout)
    except ValueError as error:
        return [f"export.megatron_llm: {error}"]
    return []


def _local_model(folder: Path, settings: ModelSettings) -> ModelConfig:
    model = families.config_from_hf(model_sources.describe(folder, settings.config))
    try:
        stored = model_sources.stored_tensors(folder)
    except WeightsError:  # of a file that is not the model's, perhaps: download tells of those that it takes
        return model
    if stored:
        families.check_stored(model, {name: shape for name, (_, shape) in stored.items()})
    return model
