"""What a training is to do, from its spec and its inputs; refused where the data do not give a sample."""

from dataclasses import replace
from pathlib import Path

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.train_config import DataSet, Job
from megatron_core_impl.training_conversations import Role
from megatron_core_impl.training_data import Part, check_data, parts_of, tokens_per_epoch
from stages.contracts import artifacts as a
from stages.contracts.specs import TrainSpec
from stages.runtime import BadInput

INDEX = ".cache/index"  # in the workspace: the orders of samples, which all trainings share


def job_of(spec: TrainSpec, weights: a.WeightsArtifact, dataset: a.DatasetArtifact, folder: Path) -> Job:
    """The job of a spec; a length in epochs becomes one in steps.

    Raises:
        BadInput: the data leave nothing to train on, or nothing to measure the held-out loss on, or the length is none.
    """
    workspace = Path(spec.workspace)
    data = workspace / spec.inputs["dataset"].path
    job = Job(
        config=spec.settings.train_config(),
        model=ModelConfig(**weights.model.config_fields()),
        weights=workspace / spec.inputs["weights"].path,
        sets=tuple(
            DataSet(
                prefix=data / each.name,
                role=each.role,
                weight=spec.blend.get(each.name, 1.0),
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
        return replace(job, config=spec.settings.train_config(tokens_per_epoch(job)))
    except ValueError as error:
        raise BadInput(f"train: {error}") from None


def _check_text(job: Job) -> None:
    """Refuse text that leaves a role without a sample."""
    roles: tuple[Role, ...] = ("train", "valid")
    for role in roles:
        parts = parts_of(job.sets, job.config.split, role)
        if not _has_a_sample(parts, job.config.sequence_length):
            raise BadInput(_too_little(role, parts, job))


def _has_a_sample(parts: list[Part], sequence_length: int) -> bool:
    return any(part.tokens > sequence_length for part in parts)


def _too_little(role: Role, parts: list[Part], job: Job) -> str:
    """Why a role has no samples, and what would give it some."""
    settings = job.config
    better = next(
        (
            split
            for split in ("95,5,0", "90,10,0", "80,20,0", "50,50,0")
            if all(_has_a_sample(parts_of(job.sets, split, each), settings.sequence_length) for each in ("train", "valid"))
        ),
        None,
    )
    advice = f'Set train.split to "{better}", or lower' if better else "Give more text, or lower"
    documents, of = sum(len(part.documents) for part in parts), sum(len(part.data) for part in parts)
    return (
        f'train.split="{settings.split}" gives the {role} split {documents:,} of {of:,} documents with '
        f"{sum(part.tokens for part in parts):,} tokens, and one sample needs {settings.sequence_length + 1:,}. {advice} "
        f"train.sequence_length (now {settings.sequence_length})"
    )
