"""When a stage may begin: not while another run makes the same result, and trainings one after the other (`locks.py`).

Who waits says so: in the log, in the run's record, and so in `finetune status`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from prefect import get_run_logger

from flows.launch import choose
from flows.launch.protocol import StageFailed
from flows.records.locks import Stopped, held, training_locks, wait_until_free
from flows.records.run_record import all_runs
from flows.running.run import Run
from flows.running.watch import watched
from stages.contracts.launch_settings import Gpus, machine_has_gpus
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

    try:
        lock = spec.folder.parent / f".{spec.key}.lock"  # the stage's own: stages.runtime
        wait_until_free(lock, stop=run.stop, on_wait=lambda: say(f"waiting: {_maker(run, spec)} is making this result"))
        locks = training_locks(run.workspace, _gpus(run)) if spec.STAGE == "train" else []
        who = f"run {run.folder.name} of {run.workspace}"
        with held(locks, who, stop=run.stop, on_wait=say) as descriptors:
            if said:
                run.record.node(spec.NODE, doing=None)
            # A container is no child of ours: were we killed, it would go on without our locks while it saves a checkpoint.
            in_containers = bool(locks) and choose.in_containers(run.config.launch)
            with watched(run.folder, descriptors) if in_containers else nullcontext():
                yield descriptors
    except Stopped:
        told = "stopped while it waited for its turn"
        raise StageFailed(
            spec.NODE, "interrupted", told, log_file=run.folder.log(spec.NODE), code=ExitCode.INTERRUPTED
        ) from None


def _gpus(run: Run) -> Gpus:
    return run.config.launch.wanted_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"), has_gpus=machine_has_gpus())


def _maker(run: Run, spec: Spec) -> str:
    """The run that makes a result, as far as the workspace knows."""
    for record in all_runs(run.workspace):
        node = record.nodes.get(spec.NODE)
        if record.name != run.folder.name and record.state == "running" and node is not None and node.key == spec.key:
            return f"run {record.name}"
    return "another process"
