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
import gc
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

import megatron_core_impl
from megatron_core_impl.checkpoint.digests import file_blake3
from megatron_core_impl.checkpoint.durable import sync, sync_tree
from stages.contracts import artifacts as a
from stages.contracts.specs import SPECS, Spec
from stages.input_check import InputCheck

EVENT_PREFIX = "@@stage "
LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "safetensors")  # told of where a stage loaded them
SWITCH_SECONDS = 0.0002  # that a thread waits before it takes the interpreter from another, while something is imported

S = TypeVar("S", bound=Spec)
A = TypeVar("A", bound=a.Artifact)


class ExitCode(IntEnum):
    """What became of a stage."""

    OK = 0
    CRASH = 1  # our fault: a traceback stands above
    BAD_INPUT = 2  # the person's to mend: the message says what to change
    GATE_FAILED = 3  # the stage did its work and its check refused the result
    INTERRUPTED = 4  # stopped from outside; running it again goes on or starts anew


class StageError(Exception):
    """An end of the stage that the person can read: no traceback."""

    code = ExitCode.BAD_INPUT


class BadInput(StageError):
    """Something given to the stage is wrong; the message says what to change."""


class GateFailed(StageError):
    """The stage's own check refuses the result."""

    code = ExitCode.GATE_FAILED


class Interrupted(BaseException):
    """The stage was asked to stop. No Exception: what a library catches and forgets must not include it."""

    code = ExitCode.INTERRUPTED


class Context:
    """What a running stage has: its scratch folder, its inputs, and a way to tell how far it is."""

    def __init__(self, spec: Spec, scratch: Path) -> None:
        self.spec = spec
        self.scratch = scratch
        self.workspace = Path(spec.workspace)
        self.events = os.environ.get("STAGE_EVENTS") == "1"
        self._last_progress = 0.0
        self._inputs: dict[str, a.Artifact] = {}
        self._checks: dict[str, InputCheck] = {}  # under way

    def input(self, name: str, kind: type[A], *, is_checked_meanwhile: bool = False) -> tuple[A, Path]:
        """An input's artifact and its folder, its files checked against their digests.

        Args:
            is_checked_meanwhile: files are hashed while the stage goes on. Whatever it made of one that turns out damaged is
                thrown away, and the damage is what is told, not what followed from it. For stages that take minutes.

        Raises:
            BadInput: it is missing, of another kind, not the one the spec names, or damaged.
        """
        artifact, folder = self._open(name, kind)
        try:
            self._checks[name] = InputCheck(folder, artifact)
        except a.DamagedArtifact as error:
            raise BadInput(f"inputs.{name}: {error}") from error
        if not is_checked_meanwhile:
            self.wait_for_checks()
        return artifact, folder

    def facts(self, name: str, kind: type[A]) -> A:
        """The artifact of an input of which the stage reads no file, so none is checked.

        Raises:
            BadInput: it is missing, of another kind, or not the one the spec names.
        """
        return self._open(name, kind)[0]

    def _open(self, name: str, kind: type[A]) -> tuple[A, Path]:
        ref = self.spec.inputs.get(name)
        if ref is None:
            raise BadInput(f"inputs.{name}: missing from the spec; it needs the folder of a {kind.__name__}")
        folder = self.workspace / ref.path
        try:
            artifact = a.load_artifact(folder)
        except a.DamagedArtifact as error:
            raise BadInput(f"inputs.{name}: {error}") from error
        if not isinstance(artifact, kind):
            raise BadInput(f"inputs.{name}: {folder} holds a {artifact.kind} artifact, this needs a {kind.__name__}")
        if ref.fingerprint is not None and artifact.fingerprint != ref.fingerprint:
            raise BadInput(
                f"inputs.{name}: fingerprint of {folder} is {artifact.fingerprint}, the spec asks for {ref.fingerprint}"
            )
        if ref.content is not None and ref.content != getattr(artifact, "content", None):
            raise BadInput(f"inputs.{name}: {folder} does not hold content {ref.content}: leave that out of the spec")
        self._inputs[name] = artifact
        return artifact, folder

    def wait_for_checks(self) -> None:
        """Return when the files of all inputs are what their artifacts record.

        Raises:
            BadInput: naming the file that is not.
        """
        for name, check in self._checks.items():
            try:
                check.wait()
            except a.DamagedArtifact as error:
                raise BadInput(f"inputs.{name}: {error}") from None
        self._checks.clear()

    def log(self, message: str) -> None:
        """One line for people."""
        print(message, flush=True)

    def warn(self, message: str) -> None:
        """One line that deserves a look."""
        print(f"warning: {message}", flush=True)

    def progress(self, done: float, total: float, text: str) -> None:
        """How far the stage is. Cheap: at most one line a second by a launcher, one every five seconds by hand."""
        now = time.monotonic()
        if now - self._last_progress < (1.0 if self.events else 5.0) and done < total:
            return
        self._last_progress = now
        if self.events:
            event = {"event": "progress", "done": done, "total": total, "text": text}
            print(EVENT_PREFIX + json.dumps(event), flush=True)
        else:
            share = 100 * done / total if total else 100
            print(f"{share:3.0f} %  {text}", flush=True)

    def artifact(
        self,
        kind: type[A],
        *,
        figure: str,
        metrics: dict[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
        volatile: tuple[str, ...] = (),
        torch_version: str | None = None,
        **facts: Any,
    ) -> A:
        """The artifact of everything that now lies in the scratch folder.

        Args:
            digests: BLAKE3 of files by name, where it was taken already, of bytes that are proven to lie there.
            volatile: files, or folders with a trailing slash, that are kept but do not decide the fingerprint.
        """
        known = digests or {}
        names = sorted(p.relative_to(self.scratch).as_posix() for p in self.scratch.rglob("*") if p.is_file())

        def record(name: str) -> a.FileRecord:
            path = self.scratch / name
            is_volatile = any(name == v or (v.endswith("/") and name.startswith(v)) for v in volatile)
            digest = known.get(name) or file_blake3(path)
            return a.FileRecord(size=path.stat().st_size, blake3=digest, volatile=is_volatile)

        with ThreadPoolExecutor(max_workers=2) as pool:
            files = dict(zip(names, pool.map(record, names), strict=True))
        kind_name = str(kind.model_fields["kind"].default)
        artifact = kind(
            stage=self.spec.STAGE,
            key=self.spec.key,
            path=self.spec.path,
            files=files,
            fingerprint="",
            inputs={name: i.fingerprint for name, i in self._inputs.items()},
            spec=self.spec.record(),
            versions=a.Versions(
                package=megatron_core_impl.__version__,
                python=platform.python_version(),
                torch=torch_version or _torch_version(),
                libraries={name: metadata.version(name) for name in LIBRARIES if name in sys.modules},
                image=os.environ.get("STAGE_IMAGE"),
            ),
            figure=figure,
            metrics=metrics or {},
            wall_seconds=0.0,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        )
        return artifact.model_copy(update={"fingerprint": a.fingerprint_of(kind_name, files, artifact.facts())})


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of something large while inputs are hashed.

    The threads that hash get their turn at once: otherwise each block of theirs waits 5 ms for the interpreter, longer than it
    takes. And no garbage is looked for, as there is none, then or later: with PyTorch that search is a fifth of the time.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        sys.setswitchinterval(interval)


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def main(
    node: str | dict[str, str], run: Callable[[Any, Context], a.Artifact], doc: str | None, *, resumable: bool = False
) -> NoReturn:
    """Run a stage as a process: parse the command line, do the work, exit.

    `node` is the stage's name in the pipeline, or, where one stage serves several, {key in the spec's JSON: node}.
    """
    raise SystemExit(_main(node, run, doc or "", resumable))


def _main(node: str | dict[str, str], run: Callable[[Any, Context], a.Artifact], doc: str, resumable: bool) -> int:
    nodes = [node] if isinstance(node, str) else list(node.values())
    stage = SPECS[nodes[0]].STAGE
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=doc,
        epilog=_spec_help(nodes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", metavar="SPEC.json", type=Path, help="what to do, as JSON (see below)")
    arguments = parser.parse_args()
    try:
        spec = read_spec(arguments.spec, node)
        with _stopped_by_signals():
            artifact = execute(spec, run, resumable=resumable)
        print(f"{stage}: {artifact.figure}\n{stage}: {Path(spec.workspace) / artifact.path}", flush=True)
        return ExitCode.OK
    except (StageError, Interrupted) as error:
        return _fail(stage, str(error), error.code)
    except OSError as error:
        # A machine that lacks something is the person's to mend; any other error of the system is a defect of ours.
        told = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EROFS: "read-only file system",
                errno.EACCES: "permission denied"}.get(error.errno or 0)  # fmt: skip
        if told is None:
            traceback.print_exc()
            return _fail(stage, f"{error}. This is a defect of ours; the traceback is above", ExitCode.CRASH)
        path = error.filename2 or error.filename  # of a copy that fails the second is what is written
        where = f" at {path}" if path else ""
        return _fail(stage, f"{told}{where}: make room or choose another workspace, then run again", ExitCode.BAD_INPUT)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. This is a defect of ours; the traceback is above"
        return _fail(stage, message, ExitCode.CRASH)


def _fail(stage: str, message: str, code: ExitCode) -> int:
    sys.stdout.flush()
    if os.environ.get("STAGE_EVENTS") == "1":
        print(EVENT_PREFIX + json.dumps({"event": "error", "message": message, "code": int(code)}), flush=True)
    print(f"error: {stage}: {message}", file=sys.stderr, flush=True)
    return code


def _spec_help(nodes: list[str]) -> str:
    """The settings of a spec, for --help."""
    lines = ["spec:"]
    for node in nodes:
        cls = SPECS[node]
        if len(nodes) > 1:
            lines.append(f"  {node}: {(cls.__doc__ or '').splitlines()[0]}")
        lines.append('  "workspace"  absolute path of the workspace; the result goes to <workspace>/' + cls.STAGE + "/<key>")
        for name, kind in cls.INPUTS.items():
            lines.append(f'  "inputs"."{name}"  {{"path": folder of a {kind.__name__}, relative to the workspace}}')
        for name, field in cls.model_fields.items():
            if name in ("workspace", "inputs"):
                continue
            inner = getattr(field.annotation, "model_fields", None)
            if inner is None:
                lines.append(f'  "{name}"  {_setting_help(field)}')
            else:
                lines += [f'  "{name}"."{key}"  {_setting_help(sub)}' for key, sub in inner.items()]
    lines.append("exit codes: 0 done, 1 defect, 2 bad input, 3 failed check, 4 interrupted (run again to go on)")
    return "\n".join(lines)


def _setting_help(field: FieldInfo) -> str:
    """What a setting means, its legal values where they are few, its default in brackets."""
    legal = [str(value) for value in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    parts = [field.description or "", f" ({' | '.join(legal)})" if len(legal) > 1 else ""]
    if not field.is_required() and field.default is not None and field.default != ():
        parts.append(f" [{json.dumps(field.default)}]")
    return "".join(parts)


def read_spec(path: Path, node: str | dict[str, str]) -> Spec:
    """Read and validate a spec.

    Raises:
        BadInput: the file is missing, not JSON, or not this stage's spec; the message names the key.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --help shows what a spec looks like") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if isinstance(node, dict):
        found = [name for key, name in node.items() if isinstance(data, dict) and key in data]
        if len(found) != 1:
            raise BadInput(f"{path}: must have exactly one of the keys {', '.join(node)}")
        node = found[0]
    try:
        return SPECS[node].model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "spec"
        raise BadInput(f"{path}: {where}: {first['msg']} (got {first['input']!r})") from None


def execute(spec: S, run: Callable[[S, Context], a.Artifact], *, resumable: bool = False) -> a.Artifact:
    """Do the work of a spec, or take the result that is there, and return the published artifact."""
    started = time.monotonic()
    final = spec.folder
    _make_folder(final.parent)
    scratch = final.parent / f".{spec.key}.partial"
    with _locked(final.parent / f".{spec.key}.lock"):
        existing = a.find_reusable(final)
        if existing is not None:
            return existing
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
