"""One typed task per node of the pipeline, around one way of running a stage.

A task's cache key has its spec's key in it, so Prefect's records and the stage's own folder agree on what is done. Parameters
are named as the spec names its inputs.
"""

import hashlib
import os
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from flows.launch.protocol import StageFailed
from flows.running.run import Run
from flows.running.run_stage import check_training, run_stage
from flows.show.pages.failed import failed_page
from flows.show.pages.live import progress_key
from flows.show.pages.stage import stage_page
from stages.contracts import artifacts as a
from stages.contracts import specs as s
from stages.contracts.words import brief


def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """The node, the key of its spec, and the workspace: Prefect's records are found from every one, a result in its own only.

    Prefect runs a task uncached, without a word, when this raises: it must not.
    """
    inputs = {name: value for name, value in parameters.items() if name != "run"}
    run: Run = parameters["run"]
    given = run.given.get(context.task.name)
    key = given.key if given is not None else s.SPECS[context.task.name].of(run.config, **inputs).key
    place = hashlib.sha256(os.fsencode(run.workspace)).hexdigest()[:16]
    return f"{context.task.name}-{key}-{place}"


def record_result(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> None:
    """When a node is done, whether it ran or its result was there: note it in the run's record, show it in the UI."""
    _note_result(task.name, state.result(), cached=state.name == "Cached")


def _task() -> tuple[Run, UUID]:
    """The run of the task that this thread does, or has just ended, and the task run's id."""
    context = TaskRunContext.get()
    assert context is not None
    return context.parameters["run"], context.task_run.id


def _note_result(node: str, artifact: a.Artifact, *, cached: bool) -> None:
    run, task_run_id = _task()
    run.made(node, artifact, cached=cached)
    page = stage_page(node, artifact, run.workspace, cached=cached)
    run.board.put(node, "markdown", page, artifact.figure, task_run_id=task_run_id, is_final=True)
    # A stage tells how far it is, not that it is done.
    run.board.complete(progress_key(node), artifact.figure, task_run_id=task_run_id)


def show_failure(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> None:
    """When a node has failed: its page in the UI says why, and what it said last."""
    run, task_run_id = _task()
    error: BaseException = state.result(raise_on_failure=False)
    node = error.node if isinstance(error, StageFailed) else task.name
    if run.record.snapshot().nodes[node].error is None:  # what a stage fails with is noted where it is run
        run.record.node(node, state="failed", error=f"{type(error).__name__}: {error}")
    record = run.record.snapshot()
    page = failed_page(node, run.folder, record, error)
    words = brief(record.nodes[node].error or "")
    run.board.put(node, "markdown", page, words, task_run_id=task_run_id, is_final=True)


def _node(spec: type[s.Spec]) -> dict[str, Any]:
    """What all our tasks have in common."""
    return {
        "name": spec.NODE,
        "task_run_name": spec.NODE,
        "persist_result": True,
        "cache_key_fn": cache_key,
        "on_completion": [record_result],
        "on_failure": [show_failure],
    }


@task(**_node(s.DownloadModelSpec))
def download_model(run: Run) -> a.ModelArtifact:
    """Fetch the base model from the Hub, or take a local Hugging Face folder."""
    return run_stage(run, a.ModelArtifact, s.DownloadModelSpec)


@task(**_node(s.DownloadDataSpec))
def download_data(run: Run) -> a.RawDataArtifact:
    """Fetch the text, as jsonl."""
    return run_stage(run, a.RawDataArtifact, s.DownloadDataSpec)


@task(**_node(s.PreprocessSpec))
def preprocess(run: Run, data: a.RawDataArtifact, model: a.ModelArtifact) -> a.DatasetArtifact:
    """Text to token ids, in Megatron's format. What training could not begin with is refused before other work is done."""
    done = run_stage(run, a.DatasetArtifact, s.PreprocessSpec, data=data, model=model)
    if run.does("train"):
        dataset: a.DatasetArtifact = done.data if isinstance(done, State) else done
        _note_result("preprocess", dataset, cached=isinstance(done, State))  # whatever train says to it
        check_training(run, dataset, model)
    return done


@task(**_node(s.ConvertSpec))
def convert(run: Run, model: a.ModelArtifact) -> a.WeightsArtifact:
    """Hugging Face weights to canonical ones."""
    return run_stage(run, a.WeightsArtifact, s.ConvertSpec, model=model)


@task(**_node(s.VerifySpec))
def verify(run: Run, model: a.ModelArtifact, weights: a.WeightsArtifact, dataset: a.DatasetArtifact) -> a.VerificationArtifact:
    """The gate: our model against transformers on the same tokens."""
    return run_stage(run, a.VerificationArtifact, s.VerifySpec, model=model, weights=weights, dataset=dataset)


@task(**_node(s.ShardSpec))
def shard(run: Run, weights: a.WeightsArtifact) -> a.WeightsArtifact:
    """Canonical weights, cut for the layout."""
    return run_stage(run, a.WeightsArtifact, s.ShardSpec, weights=weights)


@task(**_node(s.TrainSpec))
def train(run: Run, weights: a.WeightsArtifact, dataset: a.DatasetArtifact) -> a.CheckpointArtifact:
    """Training on tp × pp × dp processes."""
    return run_stage(run, a.CheckpointArtifact, s.TrainSpec, weights=weights, dataset=dataset)


@task(**_node(s.MergeSpec))
def merge(run: Run, checkpoint: a.CheckpointArtifact) -> a.WeightsArtifact:
    """The checkpoint's weights, canonical again."""
    return run_stage(run, a.WeightsArtifact, s.MergeSpec, checkpoint=checkpoint)


@task(**_node(s.ExportSpec))
def export(
    run: Run,
    model: a.ModelArtifact,
    weights: a.WeightsArtifact,
    dataset: a.DatasetArtifact,
    checkpoint: a.CheckpointArtifact,
) -> a.ExportArtifact:
    """Canonical weights to a folder that transformers loads."""
    return run_stage(run, a.ExportArtifact, s.ExportSpec, model=model, weights=weights, dataset=dataset, checkpoint=checkpoint)


@task(**_node(s.PushSpec))
def push(
    run: Run,
    export: a.ExportArtifact,
    checkpoint: a.CheckpointArtifact,
    dataset: a.DatasetArtifact,
    data: a.RawDataArtifact,
    verification: a.VerificationArtifact,
) -> a.PushArtifact:
    """Publish the exported model."""
    return run_stage(
        run, a.PushArtifact, s.PushSpec,
        export=export, checkpoint=checkpoint, dataset=dataset, data=data, verification=verification,
    )  # fmt: skip
