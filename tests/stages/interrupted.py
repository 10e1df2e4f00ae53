"""Does operations again and again in forks of this process, and has them killed, or the disk full, at one moment of each.

    python tests/stages/interrupted.py FOLDER OPERATION[,OPERATION...] KILLS

Moments are what an operation asks of the file system: opening a file to write, writing (half of it is done), fsync, rename,
link, removal. They are counted in a first run; then come KILLS of them, drawn with a seed, and some at random times. After
each, what is published must be the old state or the new one, and the next run must complete and make the same. Prints what it
did as JSON, by operation.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"  # threads of a pool do not survive a fork

from tiny_job import changed, make_job, stop_after  # noqa: E402
from weights_inputs import HF, make_checkpoint, make_model, random_model, ref  # noqa: E402

from megatron_core_impl.checkpoint import training as checkpoints  # noqa: E402
from megatron_core_impl.config import Layout  # noqa: E402
from megatron_core_impl.mesh import Mesh  # noqa: E402
from megatron_core_impl.trainer import train  # noqa: E402
from stages import convert, export_weights, merge, runtime, shard  # noqa: E402
from stages.context import Context  # noqa: E402
from stages.contracts import artifacts as a  # noqa: E402
from stages.contracts import intact  # noqa: E402
from stages.contracts.specs import ConvertSpec, ExportSpec, MergeSpec, ShardSpec, Spec  # noqa: E402

OTHER_EVENTS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}


@dataclass
class Operation:
    """Something that is to be interrupted, in a folder of its own."""

    run: Callable[[], object]
    reset: Callable[[], None]  # to the state before
    published: Callable[[], str]  # what a reader finds, checked: a name for the state. Raises if it is half of something
    left: Callable[[], list[str]]  # what lies about and should not, after a run that completed


class Moments:
    """Counts what a process asks of the file system, and lets it die, or fail, at one of these moments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.at, self.fails = str(folder), 0, 0, False
        self.is_on = False
        self._pwrite, self._fsync = os.pwrite, os.fsync
        os.pwrite, os.fsync = self._on_pwrite, self._on_fsync  # type: ignore[assignment]
        sys.addaudithook(self._on_event)

    def _comes(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _end(self, path: str | None = None) -> None:
        if not self.fails:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not is_write and event not in OTHER_EVENTS:
            return
        path = str(arguments[0]) if isinstance(arguments[0], int) else os.fsdecode(arguments[0])
        is_here = path.startswith(self.folder) or not path.startswith("/")  # rmtree names files relative to their folder
        if not is_here or not self._comes():
            return
        if self.fails and event in ("os.remove", "os.rmdir"):
            return  # a full disk lets files be removed
        self._end(path)

    def _on_pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.is_on and self._comes():
            self._pwrite(descriptor, data[: len(data) // 2], offset)
            self._end()
        return self._pwrite(descriptor, data, offset)

    def _on_fsync(self, descriptor: int) -> None:
        if self.is_on and self._comes():
            self._end()
        self._fsync(descriptor)


def fork(work: Callable[[], object], say: Path, kill_after: float | None = None) -> int:
    """Do something in a fork; returns how it ended: 0, 1 with an error in the file `say`, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 0
        try:
            work()
        except BaseException as error:
            MOMENTS.is_on = False
            code = 1
            say.write_text(f"{type(error).__name__}: {error}")
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def of_stage(spec: Spec, run: Callable[[Any, Context], a.Artifact]) -> Operation:
    """A stage. Nothing, or its whole result."""

    def published() -> str:
        if not spec.folder.exists():
            return "old"
        artifact = a.load_artifact(spec.folder)
        intact.check_files(spec.folder, artifact, thorough=True)
        return artifact.fingerprint

    def left() -> list[str]:
        names = {path.name for path in spec.folder.parent.iterdir()}
        return sorted(names - {spec.key, f".{spec.key}.lock"})

    return Operation(
        run=lambda: runtime.execute(spec, run),
        reset=lambda: shutil.rmtree(spec.folder.parent, ignore_errors=True),
        published=published,
        left=left,
    )


def write_export(spec: ExportSpec, ctx: Context) -> a.ExportArtifact:
    """The part of stages.export that writes: the gate after it only reads."""
    weights, folder = ctx.input("weights", a.WeightsArtifact, is_checked_meanwhile=True)
    target = ctx.scratch / "model"
    target.mkdir()
    written = export_weights.write_weights(folder, weights.model, target, ctx, limit=30_000)
    (target / "config.json").write_text(json.dumps(HF))
    return ctx.artifact(
        a.ExportArtifact, figure="", digests={f"model/{name}": digest for name, digest in written.digests.items()},
        model=weights.model, loss_before=None, loss_after=None, mean_error=0.0, source="", source_revision=None,
    )  # fmt: skip


def of_training(folder: Path) -> Operation:
    """Two further steps of a training with a checkpoint at step 2: it stays, or the one at step 4 is there."""
    job = changed(make_job(folder / "inputs"), steps=4, keep_checkpoints=1, checkpoint_interval=2)
    train(job, Mesh.single(), should_stop=stop_after(2))
    before = folder / "before"
    shutil.copytree(job.folder, before)

    def reset() -> None:
        shutil.rmtree(job.folder)
        shutil.copytree(before, job.folder)

    def published() -> str:
        root, steps = job.checkpoints, checkpoints.finished_steps(job.checkpoints)
        for step in steps:
            step_folder = checkpoints.step_folder(root, step)
            state = checkpoints.read_state(step_folder)
            checkpoints.check_files(step_folder, checkpoints.recorded_files(step_folder, state))
        if steps[0] == 2:
            return "old"
        newest = checkpoints.step_folder(root, steps[0])
        files = checkpoints.recorded_files(newest, checkpoints.read_state(newest))
        return f"step {steps[0]}: {sorted(files.items())}"

    def left() -> list[str]:
        # A checkpoint that should have been dropped may stay until the next is written, but nothing half
        return sorted(path.name for path in job.checkpoints.iterdir() if not path.name.removeprefix("step-").isdigit())

    return Operation(run=lambda: train(job, Mesh.single()), reset=reset, published=published, left=left)


def operation(name: str, folder: Path) -> Operation:
    """What is to be interrupted."""
    if name == "training":
        return of_training(folder)
    workspace = str(folder)
    if name == "shard":
        weights = runtime.execute(
            ConvertSpec(workspace=workspace, inputs={"model": ref(make_model(folder, random_model()))}), convert.run
        )
        return of_stage(ShardSpec(workspace=workspace, inputs={"weights": ref(weights)}, tp=2), shard.run)
    import torch

    trained = make_checkpoint(folder, random_model(dtype=torch.float32), layout=Layout(tp=2))
    spec = MergeSpec(workspace=workspace, inputs={"checkpoint": ref(trained)})
    if name == "merge":
        return of_stage(spec, merge.run)
    merged = runtime.execute(spec, merge.run)
    return of_stage(ExportSpec(workspace=workspace, inputs={"weights": ref(merged)}), write_export)


def interrupted(folder: Path, name: str, kills: int) -> dict[str, Any]:
    """Interrupt an operation again and again. Returns what was found."""
    work, say, count = operation(name, folder), folder / "said", folder / "count"
    draw = random.Random(name)

    def watched(at: int, fails: bool) -> Callable[[], object]:
        def run() -> None:
            MOMENTS.count, MOMENTS.at, MOMENTS.fails, MOMENTS.is_on = 0, at, fails, True
            work.run()
            MOMENTS.is_on = False
            count.write_text(str(MOMENTS.count))

        return run

    started = time.monotonic()
    assert fork(watched(0, False), say) == 0, say.read_text()
    seconds, moments, new = time.monotonic() - started, int(count.read_text()), work.published()
    work.reset()
    assert work.published() == "old"
    states, told = [], []

    def check(how: str) -> None:
        states.append(state := work.published())
        assert state in ("old", new), f"{how}: found {state}"
        assert fork(watched(0, False), say) == 0, f"{how}: the next run failed: {say.read_text()}"
        assert work.published() == new, f"{how}: the next run made something else"
        assert work.left() == [], f"{how}: the next run left {work.left()}"
        work.reset()

    def some(count: int) -> list[int]:
        """Moments: a half of them from the last quarter, where things are published and removed."""
        late = draw.sample(range(moments * 3 // 4, moments + 1), min(count // 2, moments // 4))
        return sorted({*late, *draw.sample(range(1, moments + 1), min(count - len(late), moments))})

    at = some(kills)
    for moment in at:
        assert fork(watched(moment, False), say) == -signal.SIGKILL
        check(f"killed at moment {moment} of {moments}")
    for _ in range(kills // 5):
        delay = draw.uniform(0, seconds)
        fork(work.run, say, kill_after=delay)
        check(f"killed after {delay:.4f} s")
    for moment in some(kills // 2):
        say.unlink(missing_ok=True)
        if fork(watched(moment, True), say) != 0:
            told.append(say.read_text())
        check(f"disk full at moment {moment} of {moments}")
    return {"moments": moments, "at": at, "old": states.count("old"), "new": states.count(new), "told": told}


if __name__ == "__main__":
    MOMENTS = Moments(Path(sys.argv[1]))
    found = {}
    for asked in sys.argv[2].split(","):
        (ours := Path(sys.argv[1], asked)).mkdir()
        found[asked] = interrupted(ours, asked, int(sys.argv[3]))
    print(json.dumps(found))
