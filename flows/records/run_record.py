"""What is known of a run: `<workspace>/runs/<name>/`, readable without Prefect and without the process that made it.

    run.json            the record: configuration, state, what every node did
    report.html         all of it for people, written at the end
    <node>              a link to the node's result, ../../<stage>/<key>
    logs/<node>.log     the node's whole output; prefect.log is Prefect's own
    specs/<node>.json   what the node was asked to do: python -m stages.<stage> specs/<node>.json repeats it by hand

The process of a run holds a lock on `.lock` while it lives; the kernel drops it however the process dies. So a record that
says `running` without a lock is a run that crashed.
"""

import contextlib
import fcntl
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import coolname
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.records.flock import is_locked, locked
from stages.contracts.specs import SPECS

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # of a folder, too: file systems take no name of any length

CANCELLED = "cancelled in Prefect"  # the error of a run that was

NodeState = Literal["waiting", "running", "ran", "cached", "failed", "stopped"]
FINISHED: tuple[NodeState, ...] = ("ran", "cached")  # the states of nodes whose results are there
RunState = Literal["running", "done", "failed", "stopped", "crashed"]


class NodeRecord(BaseModel):
    """What a node of the pipeline did in this run."""

    model_config = ConfigDict(extra="forbid")

    state: NodeState = "waiting"
    key: str | None = None
    path: str | None = None  # of its artifact, relative to the workspace
    started: datetime | None = None
    wall_seconds: float | None = None  # of this run; a cached node has none
    figure: str | None = None
    done: float | None = None  # share of the work, 0 to 1
    doing: str | None = None  # what the stage says it is at
    error: str | None = None


class RunRecord(BaseModel):
    """A run of the pipeline."""

    model_config = ConfigDict(extra="forbid")

    name: str
    state: RunState = "running"
    config: dict[str, Any]
    cwd: str  # relative paths of the configuration start here
    refresh: list[str] = []
    start_from: list[str] = []  # results that were taken as they are, with what they were made from
    stage: str | None = None  # the only node that was done, of a run that does one
    pid: int
    machine: str = ""  # whose process that is: a machine's, or a container's, name
    started: datetime
    finished: datetime | None = None
    flow_run_id: str | None = None
    has_deployment: bool = False  # a runner does it again when it is retried in Prefect
    attempt: int = 1  # of the flow run: a retry is the second
    page: str | None = None  # its address in Prefect's web UI
    error: str | None = None
    nodes: dict[str, NodeRecord] = Field(default_factory=lambda: {node: NodeRecord() for node in SPECS})

    def crashed(self) -> Self:
        """What there is to say of a run that was going on, and whose process is gone."""
        return self.model_copy(update={"state": "crashed", "error": self.error or "its process is gone"})


class RunIsLive(RuntimeError):
    """The run is going on in another process."""


class RunFolder:
    """The folder of a run. Reading needs nothing else; writing needs `held`.

    Raises:
        ValueError: the name is none of a run.
    """

    def __init__(self, workspace: Path, name: str) -> None:
        if not re.fullmatch(RUN_NAME, name):
            raise ValueError(
                f"{name!r} is no name of a run: ASCII letters (a to z, A to Z), digits and - _ . only, 64 at most, "
                "the first a letter or a digit"
            )
        self.workspace = workspace
        self.name = name
        self.path = workspace / "runs" / name
        self._lock = self.path / ".lock"

    def log(self, name: str) -> Path:
        """File of a node's output."""
        return self.path / "logs" / f"{name}.log"

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.path / "report.html"

    def spec(self, node: str) -> Path:
        """File of a node's spec."""
        return self.path / "specs" / f"{node}.json"

    def read(self) -> RunRecord | None:
        """The record, `crashed` where it says `running` and nobody lives. None when there is no readable one."""
        alive = self.is_live()  # before reading: a run that ends in between has written its end
        record = self.stored()
        return record.crashed() if record is not None and record.state == "running" and not alive else record

    def stored(self) -> RunRecord | None:
        """The record as it was written last. None when there is no readable one."""
        try:
            return RunRecord.model_validate_json((self.path / "run.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, record: RunRecord) -> None:
        """Replace the record; a reader sees the old one or the new one."""
        file = self.path / "run.json"
        draft = file.with_suffix(".json.new")
        draft.write_text(record.model_dump_json(indent=1) + "\n")
        draft.replace(file)

    def link(self, node: str, artifact_path: str) -> None:
        """Point <run>/<node> to a result."""
        link = self.path / node
        draft = self.path / f".{node}.new"
        draft.unlink(missing_ok=True)
        draft.symlink_to(Path("..", "..", artifact_path), target_is_directory=True)
        draft.replace(link)

    def unlink(self, node: str) -> None:
        """Forget the result of a node."""
        (self.path / node).unlink(missing_ok=True)

    def is_live(self) -> bool:
        """Whether a process is running this run now."""
        return is_locked(self._lock)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunIsLive: another process holds it.
        """
        with contextlib.ExitStack() as stack:
            for last in (False, False, True):  # who only asks whether we live holds it for a moment
                try:
                    stack.enter_context(locked(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    break
                except BlockingIOError:
                    if last:
                        raise RunIsLive(f"run {self.name} is going on in another process") from None
                    time.sleep(0.05)  # as little as that, to ask again
            yield


class LiveRecord:
    """The record of a run that this process is doing: every change is on disk at once. Safe to use from many threads."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        self.folder = folder
        self._record = record
        self._lock = threading.Lock()
        folder.write(record)

    def update(self, **fields: Any) -> None:
        """Change fields of the run."""
        with self._lock:
            self._record = self._record.model_copy(update=fields)
            self.folder.write(self._record)

    def node(self, name: str, **fields: Any) -> None:
        """Change fields of a node."""
        with self._lock:
            self._record.nodes[name] = self._record.nodes[name].model_copy(update=fields)
            self.folder.write(self._record)

    def snapshot(self) -> RunRecord:
        """The record as it is now."""
        with self._lock:
            return self._record.model_copy(deep=True)


def all_runs(workspace: Path) -> list[RunRecord]:
    """The runs of a workspace, newest first."""
    names = [file.parent.name for file in (workspace / "runs").glob("*/run.json")]
    folders = [RunFolder(workspace, name) for name in names if re.fullmatch(RUN_NAME, name)]
    records = [record for folder in folders if (record := folder.read()) is not None]
    return sorted(records, key=lambda record: record.started, reverse=True)


def new_name(workspace: Path) -> str:
    """A name that no run of the workspace has, such as brisk-otter."""
    while (workspace / "runs" / (name := coolname.generate_slug(2))).exists():
        pass
    return name


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)
