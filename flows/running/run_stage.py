"""The one way in which every task does its work: take the result that is there, or launch the stage and read its artifact."""

import time
from pathlib import Path
from typing import TypeVar, cast

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Completed

from flows.launch.protocol import Caller, Progress, StageFailed, StageJob
from flows.records.run_record import now
from flows.running.replaced import set_aside
from flows.running.run import Run
from flows.running.turns import in_turn
from flows.show.pages.live import shown_on
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.process import ExitCode
from stages.contracts.specs import SPECS, Spec
from stages.contracts.training_job import planned_job

A = TypeVar("A", bound=a.Artifact)


def run_stage(run: Run, kind: type[A], spec_type: type[Spec], **inputs: a.Artifact) -> A:
    """Do the work of a node and return its artifact.

    A result that is there and intact is taken, and the task shows as Cached, even if Prefect's records are gone; so is one that
    another run is making, once it is there. A node that is to be refreshed puts its old result aside first; it comes back
    should the stage fail.

    Raises:
        StageFailed: the stage did not end well, or did not leave what it should.
    """
    if (given := run.given.get(spec_type.NODE)) is not None:
        return cast(A, _taken(given, "the run starts from it"))
    spec = spec_type.of(run.config, **inputs)
    node = spec.NODE
    run.record.node(node, key=spec.key, path=spec.path)
    if node not in run.refresh and (found := intact.find_reusable(spec.folder)) is not None:
        return cast(A, _taken(found, "its folder is intact"))

    started = time.monotonic()
    run.folder.unlink(node)
    run.record.node(node, state="running", started=now())
    try:
        with in_turn(run, spec) as holds:
            if node not in run.refresh and (made := intact.find_reusable(spec.folder)) is not None:
                # Another run made it meanwhile, or one that was killed had set it aside.
                return cast(A, _taken(made, "it is there after all"))
            started = time.monotonic()  # to wait for one's turn is no work
            run.record.node(node, started=now())
            with set_aside(spec.folder, wanted=node in run.refresh):
                artifact = _launch(run, kind, spec, holds)
    except BaseException as error:
        if isinstance(error, StageFailed):
            run.failures.append(error)
        told = error.message if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}"
        state = "stopped" if run.stop.is_set() else "failed"
        run.record.node(node, state=state, error=told, wall_seconds=round(time.monotonic() - started, 1), done=None)
        raise
    run.record.node(node, wall_seconds=round(time.monotonic() - started, 1))
    return artifact


def _taken(artifact: a.Artifact, why: str) -> State[a.Artifact]:
    """To Prefect a returned state is the task's own state; the task's caller gets its data."""
    return Completed(name="Cached", message=why, data=artifact)


def check_training(run: Run, dataset: a.DatasetArtifact, model: a.ModelArtifact) -> None:
    """Refuse data that training could not begin with.

    Raises:
        StageFailed: in the name of train.
    """
    try:
        planned_job(run.config, dataset, model.model)
    except ValueError as error:
        failed = StageFailed(
            "train", "bad input", str(error), log_file=run.folder.log(SPECS["preprocess"].NODE), code=ExitCode.BAD_INPUT
        )
        run.failures.append(failed)
        run.record.node("train", state="failed", error=failed.message, done=None)
        raise failed from None


def _launch(run: Run, kind: type[A], spec: Spec, holds: tuple[int, ...]) -> A:
    job = StageJob(
        node=spec.NODE, stage=spec.STAGE, spec_file=run.folder.spec(spec.NODE), log_file=run.folder.log(spec.NODE),
        run=run.folder.name, talks_to_hub=spec.talks_to_hub, holds=holds,
    )  # fmt: skip
    job.spec_file.parent.mkdir(exist_ok=True)
    job.spec_file.write_text(spec.model_dump_json(indent=1) + "\n")
    log = PrefectLog(job.log_file)
    context = TaskRunContext.get()
    assert context is not None
    show = shown_on(run.board, spec, context.task_run.id)

    def on_progress(progress: Progress) -> None:
        run.record.node(spec.NODE, done=progress.share, doing=progress.text)
        show(progress)

    try:
        run.launcher.run(job, Caller(log.line, on_progress, run.stop))
    finally:
        log.end()
    artifact = intact.find_intact(spec.folder)
    if not isinstance(artifact, kind):
        message = f"said it was done, but left no intact {kind.__name__} in {spec.folder}. This is a defect of ours"
        raise StageFailed(job.node, "crash", message, log_file=job.log_file, code=ExitCode.CRASH)
    return artifact


class PrefectLog:
    """Passes a stage's output to the Prefect log, no faster than the server's database likes it. The file has all of it."""

    LINES_PER_SECOND = 20
    LONGEST_LINE = 4000

    def __init__(self, log_file: Path) -> None:
        self.logger = get_run_logger()
        self.log_file = log_file
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def line(self, line: str) -> None:
        """Show a line, or leave it out where there are too many."""
        second = int(time.monotonic())
        if second != self._second:
            self.end()
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > self.LINES_PER_SECOND:
            self._left_out += 1
        else:
            self.logger.info("%s", line[: self.LONGEST_LINE])

    def end(self) -> None:
        """Say how many lines were left out."""
        if self._left_out:
            self.logger.info("… %d more lines in %s", self._left_out, self.log_file)
        self._left_out = 0
