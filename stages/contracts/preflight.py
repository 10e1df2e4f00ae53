"""What can be known to be wrong before any stage starts, because the model lies on this disk."""

import json
from pathlib import Path

from megatron_core_impl.config import Layout
from megatron_core_impl.models import families
from stages.contracts.config import PipelineConfig


def check(config: PipelineConfig) -> list[str]:
    """Problems of a configuration, one line each, with the key's path. Empty when nothing is known to be wrong.

    Only local models are looked at: what the Hub holds is known once it is downloaded.
    """
    file = Path(config.model.source).expanduser() / "config.json"
    try:
        model = families.config_from_hf(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return []  # a Hub id, or a folder that download refuses with a better message
    except ValueError as error:
        return [f"model.source: {file}: {error}"]
    problems = []
    try:
        Layout(tp=config.layout.tp, pp=config.layout.pp, dp=config.layout.dp).check(model)
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
