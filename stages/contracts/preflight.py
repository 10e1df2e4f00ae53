"""What can be known to be wrong before any stage starts, because it lies on this disk."""

import json
from pathlib import Path

from megatron_core_impl.models import families
from stages.contracts import publishing
from stages.contracts.config import PipelineConfig


def check(config: PipelineConfig) -> list[str]:
    """Problems of a configuration, one line each, with the key's path. Empty when nothing is known to be wrong.

    Only local models are looked at: what the Hub holds is known once it is downloaded.
    """
    problems = [f"push.{problem}" for problem in [publishing.in_the_way(config.push)] if problem]
    folder = Path(config.model.source).expanduser()
    if not folder.is_dir():
        return problems  # a Hub id
    try:
        hf = json.loads((folder / "config.json").read_text())
        if not isinstance(hf, dict):
            raise ValueError("config.json: is no JSON object")
        model = families.config_from_hf(hf)
    except FileNotFoundError:
        return [*problems, f"model.source: {folder} has no config.json, so it is no Hugging Face model folder"]
    except OSError as error:
        return [*problems, f"model.source: {folder}/config.json cannot be read: {error.strerror}"]
    except ValueError as error:
        return [*problems, f"model.source: {folder}: {error}"]
    try:
        config.layout.layout().check(model)
    except ValueError as error:
        problems.append(f"layout: {error}")
    for key, length in (
        ("train.sequence_length", config.train.sequence_length),
        ("verify.sequence_length", config.verify.sequence_length),
    ):
        if length > model.max_position_embeddings:
            problems.append(
                f"{key}: {length} exceeds max_position_embeddings={model.max_position_embeddings} of {config.model.source}"
            )
    return problems
