"""What all stages share: read the spec, check the inputs, work in a scratch folder, publish atomically, report, exit.

A stage is a function `run(spec, ctx) -> artifact`. `main` does everything around it:

- one process per result at a time (a lock the kernel drops when its holder dies), and none when the result is there;
- work happens in `<workspace>/<stage>/.<key>.partial/`; a finished result is fsynced and renamed to
  `<workspace>/<stage>/<key>/`, so a reader never sees half of one. A failed stage leaves nothing; a resumable one (train)
  leaves its scratch to go on from;
- the outcome is an exit code (`ExitCode`) and, on failure, one line `error: <stage>: …` on stderr. A traceback only for
  what is our fault.

Started by a launcher (STAGE_EVENTS=1), a stage prints progress as lines `@@stage {json}`; started by hand, as text.
"""

import argparse
import errno
import fcntl
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from megatron_core_impl.checkpoint.durable import sync, sync_tree
from stages.context import Context, has_launcher, tell
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.process import ExitCode
from stages.contracts.specs import SPECS, Spec, refused_of
from stages.outcomes import BadInput, Interrupted, StageError
from stages.spec_file import read_spec, spec_help
from stages.unheard import outlive_the_reader

S = TypeVar("S", bound=Spec)


def main(
    node: str | dict[str, str], run: Callable[[Any, Context], a.Artifact], doc: str | None,
    *, resumable: bool = False, part: Callable[[Any, Context], None] | None = None,
) -> NoReturn:  # fmt: skip
    """Run a stage as a process: parse the command line, do the work, exit.

    Args:
        node: the stage's name in the pipeline, or, where one stage serves several, {key in the spec's JSON: node}.
        part: what is done instead of `run`, where another process has charge of the result and its scratch folder.
    """
    raise SystemExit(_main(node, run, doc or "", resumable, part))


def _main(
    node: str | dict[str, str], run: Callable[[Any, Context], a.Artifact], doc: str, resumable: bool,
    part: Callable[[Any, Context], None] | None = None,
) -> int:  # fmt: skip
    nodes = [node] if isinstance(node, str) else list(node.values())
    stage = SPECS[nodes[0]].STAGE
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=doc,
        epilog=spec_help(nodes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", metavar="SPEC.json", type=Path, help="what to do, as JSON (see below)")
    arguments = parser.parse_args()
    if has_launcher():
        outlive_the_reader()
    try:
        spec = read_spec(arguments.spec, node)
        with _stopped_by_signals():
            if part is not None:
                part(spec, Context(spec, spec.scratch))
                return ExitCode.OK
            artifact = execute(spec, run, resumable=resumable)
        print(f"{stage}: {artifact.figure}\n{stage}: {Path(spec.workspace) / artifact.path}", flush=True)
        return ExitCode.OK
    except (StageError, Interrupted) as error:
        return _fail(stage, str(error), error.code)
    except OSError as error:
        # A machine that lacks something is the person's to mend; any other error of the system is a defect of ours.
        lack = {
            errno.ENOSPC: ("no space left", "make room or choose another workspace"),
            errno.EDQUOT: ("disk quota exceeded", "make room or choose another workspace"),
            errno.EROFS: ("read-only file system", "choose another workspace"),
            errno.EACCES: ("permission denied", "allow it or choose another workspace"),
        }.get(error.errno or 0)
        if lack is None:
            traceback.print_exc()
            return _fail(stage, f"{error}. This is a defect of ours; its log has the traceback", ExitCode.CRASH)
        path = error.filename2 or error.filename  # of a copy that fails the second is what is written
        where = f" at {path}" if path else ""
        return _fail(stage, f"{lack[0]}{where}: {lack[1]}, then run again", ExitCode.BAD_INPUT)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. This is a defect of ours; its log has the traceback"
        return _fail(stage, message, ExitCode.CRASH)


def _fail(stage: str, message: str, code: ExitCode) -> int:
    sys.stdout.flush()
    tell("error", message=message, code=int(code))
    print(f"error: {stage}: {message}", file=sys.stderr, flush=True)
    return code


def execute(spec: S, run: Callable[[S, Context], a.Artifact], *, resumable: bool = False) -> a.Artifact:
    """Do the work of a spec, or take the result that is there, and return the published artifact."""
    started = time.monotonic()
    final = spec.folder
    _make_folder(final.parent)
    scratch = spec.scratch
    with _locked(final.parent / f".{spec.key}.lock"):
        existing = intact.find_reusable(final)
        if existing is not None:
            return existing
        for left in (refused_of(final), refused_of(final).with_suffix(".md")):
            left.unlink(missing_ok=True)  # by an attempt before; this one may fail for another reason
        if not resumable:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=True)
        try:
            artifact = _run_checked(spec, run, Context(spec, scratch))
            artifact = artifact.model_copy(update={"wall_seconds": round(time.monotonic() - started, 3)})
            (scratch / a.ARTIFACT_FILE).write_text(artifact.model_dump_json(indent=1) + "\n")
            sync_tree(scratch)
            _replace_folder(scratch, final)
        except BaseException:
            if not resumable or not any(scratch.iterdir()):
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        return artifact


def _run_checked(spec: S, run: Callable[[S, Context], a.Artifact], ctx: Context) -> a.Artifact:
    """Do the work of a spec. A damaged input is told before anything that may have followed from it."""
    try:
        artifact = run(spec, ctx)
    except Exception:
        ctx.wait_for_checks()
        raise
    ctx.wait_for_checks()
    return artifact


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"workspace: {folder} cannot be made: a file is in the way") from None


def _replace_folder(scratch: Path, final: Path) -> None:
    """Rename the finished folder into place. A damaged result in the way goes to `.<key>.damaged` first, then away."""
    damaged = final.parent / f".{final.name}.damaged"
    if final.exists():
        shutil.rmtree(damaged, ignore_errors=True)
        final.rename(damaged)
    scratch.rename(final)
    shutil.rmtree(damaged, ignore_errors=True)
    sync(final.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a result. The kernel drops it when the process dies, however it dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting: another process is making this result", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise Interrupted in the main thread, so that every cleanup runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; run it again to go on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
