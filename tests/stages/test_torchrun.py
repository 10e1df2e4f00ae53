"""Worker processes: whatever dies, and however, the others end too and the stage knows what happened."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import torchrun

STAGE = """
import json, sys
from pathlib import Path
from stages import torchrun

def show(event):
    print(json.dumps(event), flush=True)

nodes = torchrun.Nodes.here()
outcome = torchrun.run_workers(
    "stand_in_worker", sys.argv[1:2], processes=2 // nodes.count, log=Path(sys.argv[2]), on_event=show, nodes=nodes
)
show({"event": "outcome", "returncode": outcome.returncode, "is_stopped": outcome.is_stopped, "killed": outcome.killed})
"""


class Stage:
    """A process that runs two stand-in workers, or one of them, and what it tells."""

    def __init__(self, mode: str, log: Path, **nodes: str) -> None:
        here = Path(__file__).parent
        paths = [str(here), str(here.parents[1])]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STAGE, mode, str(log)], stdout=subprocess.PIPE, text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths), **nodes},
        )  # fmt: skip
        self.descriptors: list[int] = []
        if not nodes:
            self.wait_for(2)

    def wait_for(self, workers: int) -> None:
        """Until so many are ready."""
        ready = sorted((self.event("ready") for _ in range(workers)), key=lambda event: event["rank"])
        self.ranks = [event["rank"] for event in ready]
        self.workers = [event["pid"] for event in ready]
        self.torchrun = ready[0]["torchrun"]
        self.threads = ready[0]["threads"]
        self.descriptors = [os.pidfd_open(pid) for pid in (*self.workers, self.torchrun)]

    def event(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"ended without {name}")

    def outcome(self) -> tuple[int, bool, list[int] | None]:
        outcome = self.event("outcome")
        return outcome["returncode"], outcome["is_stopped"], outcome["killed"]

    def assert_all_gone(self) -> None:
        for descriptor in self.descriptors:
            assert select.select([descriptor], [], [], 20)[0], "still there 20 s later"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def start(mode: str = "waiting", **nodes: str) -> Stage:
        stages.append(Stage(mode, tmp_path / "logs" / "workers.log", **nodes))
        return stages[-1]

    yield start
    for stage in stages:
        stage.process.kill()
        stage.process.communicate()
        for descriptor in stage.descriptors:
            os.close(descriptor)


def test_stops_when_asked(start: Callable[..., Stage], tmp_path: Path) -> None:
    stage = start()
    stage.process.send_signal(signal.SIGTERM)
    assert {stage.event("stopped")["rank"], stage.event("stopped")["rank"]} == {0, 1}
    assert stage.outcome() == (0, True, None)
    stage.assert_all_gone()
    assert (tmp_path / "logs" / "workers.log").read_text().count("what libraries print\n") == 2
    assert int(stage.threads) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_asked_twice_ends_at_once(start: Callable[..., Stage]) -> None:
    stage = start("deaf")
    stage.process.send_signal(signal.SIGINT)
    stage.process.send_signal(signal.SIGTERM)
    assert stage.outcome()[1:] == (True, None)
    stage.assert_all_gone()


def test_a_killed_worker_is_named(start: Callable[..., Stage]) -> None:
    stage = start()
    os.kill(stage.workers[1], signal.SIGKILL)
    assert stage.outcome() == (1, False, [1, signal.SIGKILL])
    stage.assert_all_gone()


def test_a_killed_torchrun(start: Callable[..., Stage]) -> None:
    stage = start("deaf")
    os.kill(stage.torchrun, signal.SIGKILL)
    assert stage.outcome() == (-signal.SIGKILL, False, None)
    stage.assert_all_gone()


def test_nothing_outlives_a_killed_stage(start: Callable[..., Stage]) -> None:
    stage = start("deaf")
    stage.process.kill()
    stage.assert_all_gone()


def test_two_machines_share_the_workers(start: Callable[..., Stage]) -> None:
    """Each has its part, and ranks are as the machines are numbered, whoever comes first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    second = start(STAGE_NODES="2", STAGE_NODE="1", STAGE_RENDEZVOUS=meeting)
    first = start(STAGE_NODES="2", STAGE_NODE="0", STAGE_RENDEZVOUS=meeting)
    first.wait_for(1)
    second.wait_for(1)
    assert (first.ranks, second.ranks) == ([0], [1])
    assert int(first.threads) == len(os.sched_getaffinity(0))  # of its machine's cores
    for stage in (first, second):
        stage.process.send_signal(signal.SIGTERM)
    for stage in (first, second):
        assert stage.outcome() == (0, True, None)
        stage.assert_all_gone()


def test_first_killed() -> None:
    """Who missed a dead peer fails with it; who waits for one is killed by torchrun, half a minute later."""
    assert torchrun._first_killed([(0, 1, 100.0), (1, -9, 100.0)]) == (1, signal.SIGKILL)
    assert torchrun._first_killed([(0, 1, 100.0), (1, -9, 130.0)]) is None
    assert torchrun._first_killed([(0, -15, 100.0), (1, 1, 100.0)]) is None


def test_what_workers_tell_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data))
    torchrun.tell("error", message="short", trace="x\n" * 5000 + "the end é")
    assert len(written[0]) <= select.PIPE_BUF
    event = torchrun._parse(written[0].decode().strip())
    assert event is not None
    assert event["message"] == "short"
    assert event["trace"].startswith("…")
    assert event["trace"].endswith("the end é")
    assert torchrun._parse("@@worker {not json") is None
    assert torchrun._parse("what others print") is None
