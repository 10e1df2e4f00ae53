"""What a training is to do, from its settings and its data; refused where the data do not give a sample.

It is known as soon as the data are tokenized, so `finetune plan` and the flow ask here long before the stage does.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.train_config import DataSet, Job
from megatron_core_impl.training_conversations import Role
from megatron_core_impl.training_data import Part, check_data, parts_of, tokens_per_epoch
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import TrainSpec
from stages.contracts.train_settings import TrainSettings

INDEX = ".cache/index"  # in the workspace: the orders of samples, which all trainings share


def job_of(
    workspace: Path, dataset: a.DatasetArtifact, settings: TrainSettings, model: a.ModelFacts,
    *, blend: Mapping[str, float], weights: Path, folder: Path,
) -> Job:  # fmt: skip
    """The job of a training; a length in epochs becomes one in steps.

    Args:
        blend: the weight of each set, by name; others have 1.
        weights: folder of what it begins with.
        folder: where it writes.

    Raises:
        ValueError: the data leave nothing to train on, or nothing to measure the held-out loss on, or the length is none.
    """
    data = dataset.folder(workspace)
    job = Job(
        config=settings.train_config(),
        model=ModelConfig(**model.config_fields()),
        weights=weights,
        sets=tuple(
            DataSet(
                prefix=data / each.name,
                role=each.role,
                weight=blend.get(each.name, 1.0),
                fingerprint=f"{dataset.fingerprint}/{each.name}",
            )
            for each in dataset.sets
        ),
        content=dataset.content,
        folder=folder,
        cache=workspace / INDEX,
        eod_id=dataset.tokenizer.eod_id,
        header_tokens=dataset.header_tokens,
    )
    if job.content == "text":
        _check_text(job)
    try:
        if job.content == "conversations":
            check_data(job)
        return replace(job, config=settings.train_config(tokens_per_epoch(job)))
    except ValueError as error:
        raise ValueError(f"train: {error}") from None


def planned_job(config: PipelineConfig, dataset: a.DatasetArtifact, model: a.ModelFacts) -> Job:
    """The job that a run of a configuration is going to have, without where it writes.

    Raises:
        ValueError: as `job_of`.
    """
    blend: dict[str, float] = TrainSpec.settings_of(config)["blend"]
    nowhere = Path()
    return job_of(config.workspace_path, dataset, config.train, model, blend=blend, weights=nowhere, folder=nowhere)


def planned_epoch(config: PipelineConfig, dataset: a.DatasetArtifact, model: a.ModelFacts) -> int:
    """The tokens that such a run takes from its data before one is repeated.

    Raises:
        ValueError: as `job_of`.
    """
    return tokens_per_epoch(planned_job(config, dataset, model))


def _check_text(job: Job) -> None:
    """Refuse text that leaves a role without a sample."""
    roles: tuple[Role, ...] = ("train", "valid")
    for role in roles:
        parts = parts_of(job.sets, job.config.split, role)
        if not _has_a_sample(parts, job.config.sequence_length):
            raise ValueError(_too_little(role, parts, job))


def _has_a_sample(parts: list[Part], sequence_length: int) -> bool:
    return any(part.tokens > sequence_length for part in parts)


def _too_little(role: Role, parts: list[Part], job: Job) -> str:
    """Why a role has no samples, and what would give it some."""
    settings = job.config
    documents, of = sum(len(part.documents) for part in parts), sum(len(part.data) for part in parts)
    needed = f"and one sample needs {settings.sequence_length + 1:,}"
    tokens = f"{sum(part.tokens for part in parts):,} tokens"
    shorter = f"lower train.sequence_length (now {settings.sequence_length})"
    if all(part.source.role == role for part in parts):
        return f"the data for {role} have {documents:,} documents with {tokens}, {needed}. Give more text, or {shorter}"
    better = next(
        (
            split
            for split in ("95,5,0", "90,10,0", "80,20,0", "50,50,0")
            if all(_has_a_sample(parts_of(job.sets, split, each), settings.sequence_length) for each in ("train", "valid"))
        ),
        None,
    )
    advice = f'Set train.split to "{better}"' if better else "Give more text"
    return (
        f'train.split="{settings.split}" gives the {role} split {documents:,} of {of:,} documents with {tokens}, {needed}. '
        f"{advice}, or {shorter}"
    )
