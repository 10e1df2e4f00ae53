"""How the runner ends runs, and itself, whatever the server and those who ask do. `test_serve.py` has it with real runs.

And what the command around it tells of.
"""

import asyncio
import fcntl
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fake_stages import config
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed, Running, State

from flows import cli
from flows.commands import serve as command
from flows.finetune import finetune
from flows.launch.process import grace_of
from flows.records.flock import is_locked, locked
from flows.runner import patient
from flows.runner import serve as runners
from flows.runner.deployments import Deployment
from flows.runner.patient import PatientRunner
from flows.runner.requests import Requests
from flows.runner.serve import _Serving
from flows.server.local import Server


def test_a_run_is_cancelled_once_and_a_server_that_hangs_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[UUID] = []

    async def cancel(self: Runner, flow_run: UUID, state_msg: str | None = None) -> None:
        asked.append(flow_run)
        await asyncio.sleep(0)  # the other one's turn
        raise httpx.ReadTimeout("no answer")

    async def ask_twice(runner: PatientRunner, flow_run: UUID) -> None:
        await asyncio.gather(runner._cancel_run(flow_run), runner._cancel_run(flow_run))
        await runner._cancel_run(flow_run)

    monkeypatch.setattr(Runner, "_cancel_run", cancel)
    run = uuid4()
    asyncio.run(ask_twice(knowing(Running()), run))
    assert asked == [run, run], "at once it is one, afterwards it is asked for again"


def knowing(state: State) -> PatientRunner:
    """A runner whose server says that all runs are in this state."""

    async def read_flow_run(flow_run: UUID) -> SimpleNamespace:
        return SimpleNamespace(state=state)

    runner = PatientRunner()
    runner._client = SimpleNamespace(read_flow_run=read_flow_run)
    return runner


@pytest.mark.parametrize(
    ("state", "is_asked"), [(Running(), True), (Cancelled(), True), (Completed(), False), (Failed(), False)]
)
def test_a_run_that_has_just_ended_keeps_its_end(monkeypatch: pytest.MonkeyPatch, state: State, is_asked: bool) -> None:
    """What is called cancelled may go on: after some minutes Prefect calls it so by itself."""
    asked: list[UUID] = []

    async def cancel(self: Runner, flow_run: UUID, state_msg: str | None = None) -> None:
        asked.append(flow_run)

    monkeypatch.setattr(Runner, "_cancel_run", cancel)
    run = uuid4()
    asyncio.run(knowing(state)._cancel_run(run))
    assert asked == [run] * is_asked


class Left(Exception):
    """The runner's process has ended."""


class Going:
    """A runner with a run that goes on."""

    def __init__(self) -> None:
        self.state: State[Any] = Failed(message="no\x1b]0;title\x07 luck\nat all")
        self.going_on = {uuid4()}
        self.cancelled: set[UUID] = set()
        self._client = self

    def cancel(self, flow_run_ids: Iterable[UUID], why: str) -> None:
        self.cancelled |= set(flow_run_ids)

    async def see_cancellations(self) -> None:
        pass

    async def read_flow_run(self, flow_run_id: UUID) -> Any:
        return SimpleNamespace(state=self.state, name="my\x1b[2Jrun", parameters={})


def serving(said: list[str]) -> tuple[_Serving, Going]:
    served, runner = _Serving([], said.append), Going()
    served.runner = runner  # type: ignore[assignment]
    served._next_settling = float("inf")
    return served, runner


def test_every_request_counts_however_fast_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    served, runner = serving(said)

    def leave(code: int) -> None:
        assert code == 130
        raise Left

    async def drain() -> None:
        requests = Requests()
        for _ in range(3):
            requests.add()
        await served._drain(requests)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left):
        asyncio.run(drain())
    assert [line.partition(",")[0].partition(";")[0] for line in said if "started" not in line] == [
        "takes no more runs", "stops the run that goes on",
    ]  # fmt: skip
    assert runner.cancelled == runner.going_on


def test_what_is_shown_of_runs_cannot_steer_a_terminal() -> None:
    said: list[str] = []
    served, runner = serving(said)
    asyncio.run(served._show())
    runner.going_on = set()
    asyncio.run(served._show())
    assert said == ["my [2Jrun  started", "my [2Jrun  Failed  no ]0;title  luck"]


def test_how_a_run_ended_is_shown_once_prefect_knows() -> None:
    said: list[str] = []
    served, runner = serving(said)
    runner.state = Running()
    asyncio.run(served._show())
    runner.going_on = set()
    asyncio.run(served._show())
    assert said == ["my [2Jrun  started"]
    runner.state = Cancelled(message="its runner was stopped")
    asyncio.run(served._show())
    asyncio.run(served._show(is_last=True))
    assert said[1:] == ["my [2Jrun  Cancelled  its runner was stopped"]


def test_an_error_that_nobody_foresaw_does_not_end_the_runner() -> None:
    said: list[str] = []
    served, runner = serving(said)

    async def fail() -> None:
        raise LookupError("something new\x1b")

    runner.see_cancellations = fail  # type: ignore[method-assign]
    for _ in range(2):
        asyncio.run(served._round(takes_runs=False))
    assert said == ["LookupError: something new "]


def test_deployments_that_change_their_workspace(server: Server, tmp_path: Path) -> None:
    """Another runner of the same server has them, too."""
    said: list[str] = []
    served, _ = serving(said)
    name = f"moved-{uuid4().hex[:8]}"
    first, second = (
        Deployment(finetune, name, {"config": config(tmp_path / each).model_dump(mode="json")}, "") for each in ("one", "two")
    )

    async def deploy_and_ask() -> None:
        await served._tell_of_other_workspaces([first])
        await PatientRunner().aadd_flow(finetune, name=name, parameters=first.parameters)
        await served._tell_of_other_workspaces([first])
        assert said == []
        await served._tell_of_other_workspaces([second])

    with temporary_settings({PREFECT_API_URL: server.api}):
        asyncio.run(deploy_and_ask())
    assert said == [
        f"finetune-llama2/{name}: on this server for the workspace {tmp_path}/one so far, from now on for {tmp_path}/two, also "
        "where another runner does them; runners of several workspaces want servers, or configurations, of their own"
    ]


class Handle:
    """The process of a run, which takes its time to save its work."""

    pid = 1

    def __init__(self, looks: int) -> None:
        self.looks_left = looks
        self.done: list[str] = []

    def is_alive(self) -> bool:
        self.looks_left -= 1
        return self.looks_left >= 0

    def graceful_kill(self) -> None:
        self.done.append("SIGTERM")

    def hard_kill(self) -> None:
        self.done.append("SIGKILL")


@pytest.mark.parametrize(("grace", "looks", "done"), [(660.0, 3, ["SIGTERM"]), (0.0, 99, ["SIGTERM", "SIGKILL"])])
def test_a_run_that_is_cancelled_may_save_its_work(
    server: Server, monkeypatch: pytest.MonkeyPatch, grace: float, looks: int, done: list[str]
) -> None:
    """Prefect's own patience is thirty seconds."""
    assert grace_of("train") < patient.GRACE_SECONDS
    monkeypatch.setattr(patient, "GRACE_SECONDS", grace)
    handle = Handle(looks)

    async def end() -> None:
        async with PatientRunner() as runner:
            monkeypatch.setattr(runner._process_manager, "get", lambda flow_run_id: handle)
            await runner._process_manager.kill(uuid4())

    with temporary_settings({PREFECT_API_URL: server.api}):
        asyncio.run(end())
    assert handle.done == done


def test_what_breaks_while_the_runner_serves_is_not_the_workspace_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> int:
        raise ConnectionResetError("of the runner")

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "")  # to be put back
    monkeypatch.setattr(command, "serving", lambda *arguments, **options: nullcontext(Server("http://127.0.0.1:9/api")))
    monkeypatch.setattr(command, "_run", fail)
    with pytest.raises(ConnectionResetError, match="of the runner"):
        cli.main(["serve", "--workspace", str(tmp_path / "here")])
    (tmp_path / "file").touch()
    assert cli.main(["serve", "--workspace", str(tmp_path / "file")]) == 2
    assert f"error: workspace: {tmp_path}/file cannot be used: " in capsys.readouterr().err


def test_who_asks_whether_it_serves_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the healthcheck of the container does: it holds the lock for a moment."""
    served: list[bool] = []
    file = tmp_path / "prefect" / "runner.ready"

    def serve(*arguments: Any, on_ready: Callable[[], None], **options: Any) -> None:
        threading.Timer(0.2, healthcheck.close).start()  # by then the other waits for it, or has given up
        on_ready()
        served.append(is_locked(file))

    monkeypatch.setattr("flows.runner.serve.serve", serve)
    monkeypatch.setattr("flows.running.quiet.logs_to_file", lambda file: None)
    with ExitStack() as healthcheck:
        healthcheck.enter_context(locked(file, fcntl.LOCK_SH))
        assert command._run([], None, Server("http://127.0.0.1:9/api"), tmp_path) == 0
    assert served == [True]


def test_a_runner_names_a_trouble_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another(workspaces: Iterable[Path], on_trouble: Callable[[str], None]) -> list[str]:
        on_trouble("a run of another person")
        return []

    monkeypatch.setattr(runners, "reconcile", of_another)
    said: list[str] = []

    async def settle_twice() -> None:
        serving = _Serving([tmp_path], said.append)
        await serving._settle()
        await serving._settle()

    asyncio.run(settle_twice())
    assert said == ["a run of another person"]
