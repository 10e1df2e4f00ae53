"""A run while it lasts: what every task is given, and how the flow starts tasks, waits for them, and ends in order."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect import Task, get_run_logger
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.runtime import deployment, flow_run
from prefect.utilities.urls import url_for

from flows.asked.load_config import BadConfig
from flows.asked.parameters import Asked
from flows.launch import choose
from flows.launch.protocol import Launcher, StageFailed
from flows.records.run_record import CANCELLED, LiveRecord, RunFolder, RunRecord, new_name, now
from flows.running.cancelled import heeded
from flows.running.quiet import logs_to_file
from flows.running.ready import nodes_to_do, refuse_what_cannot_run
from flows.running.results import ArtifactSerializer
from flows.running.schedule import Node, Schedule
from flows.running.settle import tell_before_it_is_forgotten
from flows.running.watch import watched
from flows.server.local import kept_alive as server_kept_alive
from flows.show.ending import tell_end
from flows.show.pages.board import Board
from stages.contracts import artifacts as a
from stages.contracts.specs import SPECS

A = TypeVar("A", bound=a.Artifact)


class Run:
    """One run of the pipeline, in this process. Use `open_run`."""

    def __init__(self, asked: Asked, launcher: Launcher, record: LiveRecord) -> None:
        self.config = asked.config
        self.workspace = asked.config.workspace_path
        self.refresh = asked.refresh
        self.fresh = asked.fresh
        self.given = asked.given
        self.stage = asked.stage
        self.launcher = launcher
        self.record = record
        self.folder = record.folder
        self.board = Board(record.snapshot().flow_run_id)
        self.stop = threading.Event()  # set: every stage ends, none starts
        self.failures: list[StageFailed] = []
        self._schedule = Schedule()

    def does(self, node: str) -> bool:
        """Whether the run makes this node's result, or takes the one that is there for the same work."""
        return node not in self.given and self.stage in (None, node)

    def start(self, task: Task[..., A], *inputs: Node[Any] | a.Artifact, after: Sequence[Node[Any]] = ()) -> Node[A]:
        """Start a node as soon as its inputs, and the nodes of `after`, are done. Returns at once."""
        ready = task.with_options(
            refresh_cache=task.name in self.refresh,
            result_serializer=ArtifactSerializer(workspace=str(self.workspace)),
        )

        def begin() -> PrefectFuture[A]:
            given = [each.future if isinstance(each, Node) else each for each in inputs]
            return ready.submit(self, *given, wait_for=[node.future for node in after])

        return self._schedule.add(begin, [*(each for each in inputs if isinstance(each, Node)), *after])

    def wait(self) -> None:
        """Until every task has ended. One failure does not stop what does not depend on it: its result will be of use.

        Raises:
            StageFailed: the first one.
        """
        self._schedule.run()
        if self.failures:
            raise self.failures[0]
        for future in self._schedule.futures():
            future.result()

    def made(self, node: str, artifact: a.Artifact, *, cached: bool) -> None:
        """Note the result of a node in the run's record, and point to it in the run's folder."""
        self.folder.link(node, artifact.path)
        state = "cached" if cached else "ran"
        self.record.node(node, state=state, key=artifact.key, path=artifact.path, figure=artifact.figure, done=None, doing=None)

    def end(self) -> None:
        """Stop every stage, gracefully first, and wait for that."""
        self.stop.set()
        for future in self._schedule.futures():
            future.wait()


@contextlib.contextmanager
def open_run(asked: Asked, name: str | None) -> Iterator[Run]:
    """A run and its record, from the start of the flow to its end. Leaving it waits for all tasks; an interrupt stops them.

    Args:
        name: of the run; None: the flow run's own.

    Raises:
        BadConfig: the name is none, or the run could not be done.
        RunIsLive: another process is doing this run.
        StageFailed: a stage failed.
    """
    folder = _folder(asked.config.workspace_path, name)
    with contextlib.ExitStack() as at_the_end:
        holds = at_the_end.enter_context(server_kept_alive(revives=deployment.id is not None))
        at_the_end.enter_context(watched(folder, str(flow_run.id), flow_run.run_count or 1, holds))
        if deployment.id is not None:  # nobody has checked it yet; and a runner's terminal shows what runs, not all its lines
            refuse_what_cannot_run(asked)
            (folder.path / "logs").mkdir(parents=True, exist_ok=True)
            logs_to_file(folder.log("prefect"))
        at_the_end.enter_context(folder.held())
        tell_before_it_is_forgotten(folder.stored(), str(flow_run.id))
        record = LiveRecord(
            folder,
            RunRecord(
                name=folder.name,
                config=asked.config.model_dump(mode="json"),
                cwd=str(Path.cwd()),
                refresh=[node for node in SPECS if node in asked.refresh],
                start_from=list(asked.start_from),
                stage=asked.stage,
                pid=os.getpid(),
                machine=socket.gethostname(),
                started=now(),
                flow_run_id=flow_run.id,
                has_deployment=deployment.id is not None,
                attempt=flow_run.run_count or 1,
                page=url_for("flow-run", flow_run.id) if flow_run.id else None,
            ),
        )
        for node in SPECS:
            folder.unlink(node)  # of an earlier attempt under this name
        launch, told = choose.decided(asked.config.launch)  # once: an engine may come and go
        asked = replace(asked, config=asked.config.model_copy(update={"launch": launch}))
        if told:
            get_run_logger().warning("%s", told)
        run = Run(asked, choose.launcher_for(asked.config, nodes_to_do(asked)), record)
        if asked.stage is not None:  # what it starts from is there; in a whole run the nodes' tasks say so
            for node, artifact in asked.given.items():
                run.made(node, artifact, cached=True)
        in_peace = at_the_end.enter_context(contextlib.ExitStack())  # is left after the callback
        at_the_end.callback(tell_end, folder, run.board)
        is_cancelled = at_the_end.enter_context(heeded(flow_run.id))  # no more once the run ends
        try:
            yield run
            run.wait()
        except StageFailed as error:
            record.update(state="stopped" if run.stop.is_set() else "failed", error=str(error), finished=now())
            raise
        except BaseException as error:
            in_peace.enter_context(_sigterm_ignored())
            run.end()
            interrupted = not isinstance(error, Exception)  # Ctrl-C, or SIGTERM as Prefect tells it
            told = f"{type(error).__name__}: {error}"
            if interrupted:
                told = CANCELLED if is_cancelled.is_set() else "stopped"
            record.update(state="stopped" if interrupted else "failed", error=told, finished=now())
            raise
        record.update(state="done", finished=now())


def name_of_run() -> str:
    """What Prefect's UI calls a run: the name it was given, else the one the UI made up when it was scheduled."""
    return str(flow_run.parameters.get("run_name") or flow_run.name)


@contextlib.contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Whoever asks a run twice to stop would break the graceful end that it began at the first time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _folder(workspace: Path, name: str | None) -> RunFolder:
    if name is not None:
        try:
            return RunFolder(workspace, name)
        except ValueError as error:
            raise BadConfig([f"run_name: {error}"]) from None
    with contextlib.suppress(ValueError):  # Prefect takes any text for a name
        folder = RunFolder(workspace, str(flow_run.name))
        record = folder.read()
        if record is None or record.flow_run_id == flow_run.id:  # new, or a retry
            return folder
    name = new_name(workspace)  # made-up names can meet, too
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), name=name)
    return RunFolder(workspace, name)
