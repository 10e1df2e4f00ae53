"""What a running stage has: its scratch folder, its inputs, a way to tell how far it is, and to describe what it made."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import megatron_core_impl
from megatron_core_impl.checkpoint.digests import file_blake3
from stages.contracts import artifacts as a
from stages.contracts.process import EVENT_PREFIX
from stages.contracts.specs import Spec
from stages.input_check import InputCheck
from stages.outcomes import BadInput

LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "safetensors")  # told of where a stage loaded them

A = TypeVar("A", bound=a.Artifact)


def has_launcher() -> bool:
    """Whether a launcher listens, and not a person who started the stage by hand."""
    return os.environ.get("STAGE_EVENTS") == "1"


def tell(event: str, **values: Any) -> None:
    """Tell the launcher something, which people do not read."""
    if has_launcher():
        print(EVENT_PREFIX + json.dumps({"event": event, **values}), flush=True)


class Context:
    """What a running stage has: its scratch folder, its inputs, and a way to tell how far it is."""

    def __init__(self, spec: Spec, scratch: Path) -> None:
        self.spec = spec
        self.scratch = scratch
        self.workspace = Path(spec.workspace)
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
        if now - self._last_progress < (1.0 if has_launcher() else 5.0) and done < total:
            return
        self._last_progress = now
        if has_launcher():
            tell("progress", done=done, total=total, text=text)
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


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
