"""Pages on their way to Prefect: each is made once and changed in place, and nobody waits for the server, whatever it does."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from fake_stages import InProcess, config, make_results
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from processes import wait_until
from stories import metrics_lines, write_metrics

from flows import tasks
from flows.asked.parameters import what_is_asked
from flows.finetune import finetune
from flows.launch.protocol import Progress, StageFailed
from flows.records.run_record import LiveRecord, RunFolder, RunRecord, now
from flows.running.run import Run
from flows.server import client as clients
from flows.server.local import Server
from flows.show.ending import tell_end
from flows.show.pages import board as boards
from flows.show.pages.board import Board
from flows.show.pages.live import shown_on
from stages.contracts.specs import TrainSpec

ENDED = {"name": "brisk-otter", "config": {}, "cwd": "/", "pid": 1}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to arrive arrives before the end, on a busy machine, too."""
    monkeypatch.setattr(boards, "LAST_SECONDS", 60.0)


@pytest.fixture
def settings(server: Server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: server.api}):
        yield


@pytest.fixture
def flow_run(server: Server) -> UUID:
    """A flow run of the test's own: others put pages on this server, too, under the same keys and with the same words."""
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        return client.create_flow_run(finetune).id


def artifacts(key: str, flow_run: UUID | None = None) -> list[tuple[object, str | None]]:
    """The pages under a key: of a flow run, or all of them where no other test has the key."""
    asked = ArtifactFilter(
        key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]) if flow_run else None
    )
    with get_client(sync_client=True) as client:
        return [(artifact.data, artifact.description) for artifact in client.read_artifacts(artifact_filter=asked)]


class Door:
    """An address that takes connections and answers nothing, until it is opened to a server."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.api = f"http://127.0.0.1:{self.listener.getsockname()[1]}/api"
        self.waiting: list[socket.socket] = []
        self.behind: tuple[str, int] | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def open(self, api: str) -> None:
        """Lead to a server from now on. Who was waiting is sent away."""
        address = urlsplit(api)
        self.behind = (str(address.hostname), address.port or 80)
        for connection in self.waiting:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # ends accept
        self.listener.close()
        for connection in self.waiting:
            connection.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                if self.behind is None:
                    self.waiting.append(connection)
                    continue
                server = socket.create_connection(self.behind)
                for source, target in ((connection, server), (server, connection)):
                    threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def door() -> Iterator[Door]:
    found = Door()
    with temporary_settings({PREFECT_API_URL: found.api}):
        yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path, flow_run: UUID) -> Run:
    """A run whose tasks' hooks are called by hand."""
    folder = RunFolder(tmp_path, "brisk-otter")
    folder.path.mkdir(parents=True)
    record = RunRecord(**ENDED, started=now(), flow_run_id=str(flow_run))
    return Run(what_is_asked(config(tmp_path)), InProcess(), LiveRecord(folder, record))


def hook(run: Run, task: Task[..., Any], state: State[Any]) -> None:
    """What Prefect does when a task ends: calls its hook, in the task's context."""
    call = tasks.record_result if state.is_completed() else tasks.show_failure
    with TaskRunContext.model_construct(task=task, parameters={"run": run}, task_run=SimpleNamespace(id=None)):
        call(task, SimpleNamespace(id=None), state)  # type: ignore[arg-type]


def test_a_page_is_made_once_and_changed_in_place(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(boards, "SECONDS", 0.0)
    monkeypatch.setattr(boards, "SHARE", 1e9)
    key = f"page-{uuid4()}"
    board = Board(None)
    board.put(key, "markdown", "one", "first")
    wait_until(lambda: artifacts(key) == [("one", "first")])
    board.put(key, "markdown", lambda: "two", "second")
    wait_until(lambda: artifacts(key) == [("two", "second")])
    board.put(key, "markdown", "three", "third", is_final=True)
    board.put(key, "markdown", "late", "late")
    board.end()
    assert artifacts(key) == [("three", "third")]
    other = Board(None)
    other.put(key, "markdown", "another run", "its own")
    other.end()
    assert len(artifacts(key)) == 2


def test_training_is_shown_as_it_goes(settings: None, flow_run: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "FIRST_SECONDS", 0.0)
    results = make_results(config(tmp_path), until="shard")
    spec = TrainSpec.of(config(tmp_path), weights=results["shard"], dataset=results["preprocess"])
    write_metrics(spec.scratch, metrics_lines(20))
    board = Board(str(flow_run))
    shown_on(board, spec, uuid4())(Progress(20, 40, "step 20/40 · loss 7.0"))
    wait_until(lambda: artifacts("train-progress", flow_run) == [(50.0, "step 20/40 · loss 7.0")])
    wait_until(lambda: artifacts("train", flow_run) != [])
    [(page, words)] = artifacts("train", flow_run)
    assert "## train, 50%" in str(page)
    assert "svg+xml" in str(page)
    assert words == "step 20/40 · loss 7.0"
    for _ in range(2):  # a node's result may be noted twice
        board.complete("train-progress", "done")
    board.complete("shard-progress", "done")
    board.end()
    assert artifacts("train-progress", flow_run) == [(100.0, "done")]
    assert artifacts("shard-progress", flow_run) == [], "a stage that is soon done shows no progress"


def test_nobody_waits_for_a_server_that_hangs(door: Door, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(boards, "LAST_SECONDS", 0.05)
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 300.0)  # however slow the machine is, nobody has waited for that
    results = make_results(config(tmp_path), until="train")
    spec = TrainSpec.of(config(tmp_path), weights=results["shard"], dataset=results["preprocess"])
    show = shown_on(run.board, spec, uuid4())
    show(Progress(1, 1000, ""))
    wait_until(lambda: door.waiting != [])
    begun = time.monotonic()
    for step in range(1000):
        show(Progress(step, 1000, ""))
    hook(run, tasks.shard, Completed(data=results["shard"]))
    hook(run, tasks.train, Failed(data=StageFailed("train", "killed", "killed", log_file=tmp_path / "x.log", code=-9)))
    run.record.update(state="failed", finished=now())
    tell_end(run.folder, run.board)
    assert run.folder.report.exists()
    assert time.monotonic() - begun < clients.REQUEST_SECONDS / 2
    assert len(door.waiting) == 1, "the first request still has no answer"


def test_what_a_server_did_not_take_is_sent_at_the_end(
    door: Door, server: Server, run: Run, flow_run: UUID, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = make_results(config(tmp_path), until="convert")
    with caplog.at_level(logging.WARNING, "prefect"):
        hook(run, tasks.convert, Completed(data=results["convert"]))
        wait_until(lambda: door.waiting != [])
        door.open(server.api)
        wait_until(lambda: "pages in the UI cannot be refreshed for now" in caplog.text)
        hook(run, tasks.shard, Failed(data=RuntimeError("no kernel image")))
        run.record.update(state="failed", finished=now())
        tell_end(run.folder, run.board)
    assert run.record.snapshot().nodes["shard"].error == "RuntimeError: no kernel image"
    [convert], [shard], [summary] = (artifacts(key, flow_run) for key in ("convert", "shard", "summary"))
    assert results["convert"].fingerprint[:16] in str(convert)
    assert "RuntimeError: no kernel image" in str(shard)
    assert "## brisk-otter: failed" in str(summary)


def test_a_page_that_is_refused_keeps_no_other_back(settings: None, caplog: pytest.LogCaptureFixture) -> None:
    board, key = Board(None), f"page-{uuid4()}"
    with caplog.at_level(logging.WARNING, "prefect"):
        board.put("Not A Key", "markdown", "refused", "", is_final=True)
        board.put(key, "markdown", lambda: [][0], "cannot be made", is_final=True)
        board.put(f"{key}-two", "markdown", "two", "", is_final=True)
        board.end()
    assert artifacts(f"{key}-two") == [("two", "")]
    assert f"the page {key} is not in the UI: IndexError" in caplog.text
    assert "the page Not A Key is not in the UI: " in caplog.text


def test_pages_of_a_run_whose_process_is_gone_are_replaced(settings: None, flow_run: UUID, tmp_path: Path) -> None:
    own = Board(str(flow_run))
    own.put("train", "markdown", "## train, 50%", "step 20/40", is_final=True)
    own.end()
    folder = RunFolder(tmp_path, "brisk-otter")
    folder.path.mkdir(parents=True)
    record = RunRecord(**ENDED, state="crashed", started=now(), finished=now(), error="its process is gone")
    record.nodes["train"] = record.nodes["train"].model_copy(update={"state": "stopped", "error": "its process is gone"})
    folder.write(record)
    tell_end(folder, Board(str(flow_run)))
    [(train, _)], [_] = artifacts("train", flow_run), artifacts("summary", flow_run)
    assert str(train).startswith("## train was stopped")
