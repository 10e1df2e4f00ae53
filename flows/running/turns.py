"""When a stage may begin: not while another run makes the same result, and what computes one after the other (`locks.py`).

Who waits says so: in the log, in the run's record, and so in `finetune status`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger

from flows.launch.choose import engines_of, gpus_in_use, in_containers
from flows.launch.protocol import StageFailed
from flows.records import locks
from flows.records.run_record import all_runs
from flows.running.replaced import put_back
from flows.running.run import Run
from stages.contracts.process import ExitCode
from stages.contracts.specs import Spec


@contextmanager
def in_turn(run: Run, spec: Spec) -> Iterator[tuple[int, ...]]:
    """Wait until a stage may begin, and keep others from beginning what it excludes. Yields the descriptors of its locks.

    Raises:
        StageFailed: the run was stopped while it waited.
    """
    logger = get_run_logger()
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            logger.info("%s", text)
            run.record.node(spec.NODE, doing=text)

    def prepare() -> None:
        if _maker(run, spec) is None:  # else it has set the result aside, and its stage is about to begin
            put_back(spec.folder)
        if run.fresh and spec.NODE in run.refresh:
            shutil.rmtree(spec.scratch, ignore_errors=True)

    launch = run.config.launch
    engines = engines_of(spec.STAGE, launch) if in_containers(launch) else ()
    wanted = locks.locks_of(spec.STAGE, run.workspace, gpus_in_use(launch, os.environ), engines)
    try:
        with locks.in_turn(
            spec.folder.parent / f".{spec.key}.lock",  # the stage's own: stages.runtime
            wanted,
            f"run {run.folder.name} of {run.workspace}",
            stop=run.stop,
            on_wait=say,
            maker=lambda: _maker(run, spec) or "another process",
            prepare=prepare,
        ) as descriptors:
            if said:
                run.record.node(spec.NODE, doing=None)
            yield descriptors
    except locks.Stopped:
        told = "stopped while it waited for its turn"
        raise StageFailed(
            spec.NODE, "interrupted", told, log_file=run.folder.log(spec.NODE), code=ExitCode.INTERRUPTED
        ) from None


def _maker(run: Run, spec: Spec) -> str | None:
    """The other run that makes a result, as far as the workspace knows."""
    for record in all_runs(run.workspace):
        node = record.nodes.get(spec.NODE)
        is_at_it = record.state == "running" and node is not None and node.state == "running" and node.key == spec.key
        if is_at_it and record.name != run.folder.name:
            return f"run {record.name}"
    return None
