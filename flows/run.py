"""A run while it lasts: what every task is given, and how the flow starts tasks, waits for them, and ends in order."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows.launch import choose
from flows.launch.protocol import Launcher, StageFailed
from flows.results import ArtifactSerializer
from flows.run_record import LiveRecord, RunFolder, RunRecord, now
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import SPECS

A = TypeVar("A", bound=a.Artifact)


class Run:
    """One run of the pipeline, in this process. Use `open_run`."""

    def __init__(self, config: PipelineConfig, refresh: Sequence[str], launcher: Launcher, record: LiveRecord) -> None:
        self.config = config
        self.workspace = config.workspace_path
        self.refresh = frozenset(refresh)
        self.launcher = launcher
        self.record = record
        self.folder = record.folder
        self.stop = threading.Event()  # set: every stage ends, none starts
        self.failures: list[StageFailed] = []
        self._futures: list[PrefectFuture[Any]] = []

    def start(
        self, task: Task[..., A], *inputs: PrefectFuture[Any], after: Sequence[PrefectFuture[Any]] = ()
    ) -> PrefectFuture[A]:
        """Start a node as soon as its inputs, and the nodes of `after`, are done. Returns at once."""
        ready = task.with_options(
            refresh_cache=task.name in self.refresh,
            result_serializer=ArtifactSerializer(workspace=str(self.workspace)),
        )
        future: PrefectFuture[A] = ready.submit(self, *inputs, wait_for=list(after))
        self._futures.append(future)
        return future

    def wait(self) -> None:
        """Until every task has ended. One failure does not stop what does not depend on it: its result will be of use.

        Raises:
            StageFailed: the first one.
        """
        for future in self._futures:
            future.wait()
        if self.failures:
            raise self.failures[0]
        for future in self._futures:
            future.result()

    def end(self) -> None:
        """Stop every stage, gracefully first, and wait for that."""
        self.stop.set()
        for future in self._futures:
            future.wait()


@contextlib.contextmanager
def open_run(config: PipelineConfig, name: str, refresh: Sequence[str]) -> Iterator[Run]:
    """A run and its record, from the start of the flow to its end. Leaving it waits for all tasks; an interrupt stops them.

    Raises:
        RunIsLive: another process is doing this run.
        StageFailed: a stage failed.
    """
    folder = RunFolder(config.workspace_path, name)
    with folder.held():
        record = LiveRecord(
            folder,
            RunRecord(
                name=name,
                config=config.model_dump(mode="json"),
                cwd=str(Path.cwd()),
                refresh=list(refresh),
                pid=os.getpid(),
                started=now(),
                flow_run_id=flow_run.id,
                page=url_for("flow-run", flow_run.id) if flow_run.id else None,
            ),
        )
        for node in SPECS:
            folder.unlink(node)  # of an earlier attempt under this name
        run = Run(config, refresh, choose.launcher_for(config), record)
        try:
            yield run
            run.wait()
        except StageFailed as error:
            record.update(state="stopped" if run.stop.is_set() else "failed", error=str(error), finished=now())
            raise
        except BaseException as error:
            run.end()
            interrupted = not isinstance(error, Exception)  # Ctrl-C, or SIGTERM as Prefect tells it
            told = "stopped" if interrupted else f"{type(error).__name__}: {error}"
            record.update(state="stopped" if interrupted else "failed", error=told, finished=now())
            raise
        record.update(state="done", finished=now())
