"""What becomes of the output and the ends of containers, without an engine; and the shim that is in them."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config

from flows.launch.docker import DockerLauncher, Engine
from flows.launch.docker_checks import Image
from flows.launch.docker_container import Container, Ending
from flows.launch.docker_group import Group
from flows.launch.listener import Listener
from flows.launch.output import LineSplitter, Redactor
from flows.launch.process import SHIM
from flows.launch.protocol import Caller, StageJob
from stages.contracts.process import EVENT_PREFIX
from stages.contracts.specs import SPECS


def test_pieces_of_output_become_lines() -> None:
    def piece(stream: int, text: str) -> bytes:
        return bytes([stream, 0, 0, 0]) + len(text.encode()).to_bytes(4, "big") + text.encode()

    whole = piece(1, "one\ntw") + piece(1, "") + piece(2, "o\nthree ü\nfour")
    for size in (1, 3, 9, len(whole)):
        splitter, data, lines = LineSplitter(), bytearray(), []
        for start in range(0, len(whole), size):
            data += whole[start : start + size]
            lines += Container._unpacked(data, splitter)
        assert [*lines, splitter.end()] == ["one", "two", "three ü", "four"]


class Fake:
    """A container of a group: says some lines, then ends, when it is asked to or by itself."""

    def __init__(self, lines: list[str], ending: Ending, *, waits: bool = False, deaf: bool = False) -> None:
        self.said, self.name, self.ending = lines, "fake", ending
        self.may_end = threading.Event()
        if not waits:
            self.may_end.set()
        self.deaf, self.calls = deaf, list[str]()

    def lines(self) -> Iterator[str]:
        yield from self.said
        self.may_end.wait(10)

    def hold(self, descriptors: tuple[int, ...]) -> None:
        pass

    def ended(self, grace: float) -> Ending:
        return self.ending

    def ask_to_stop(self) -> None:
        self.calls.append("asked")
        if not self.deaf:
            self.may_end.set()

    def kill(self) -> None:
        self.calls.append("killed")
        self.may_end.set()

    def remove(self) -> None:
        self.calls.append("removed")


def listen(*fakes: Fake, stop: threading.Event | None = None) -> tuple[Group, list[str]]:
    lines: list[str] = []
    caller = Caller(lines.append, print, stop or threading.Event())
    with Group(grace=0.1) as group:
        for number, fake in enumerate(fakes):
            heard = Listener(StringIO(), Redactor([]), caller, prefix=f"[{number}] ")
            group.add(fake, heard, f"host-{number}")  # type: ignore[arg-type]
        group.listen(caller.stop, lambda member, event: None)
    return group, lines


def test_all_is_well() -> None:
    group, lines = listen(Fake(["a"], Ending(0)), Fake(["b"], Ending(0)))
    assert sorted(lines) == ["[0] a", "[1] b"]
    assert group.failed() is None


@pytest.mark.parametrize(
    ("first", "second", "guilty"),
    [
        (Ending(1), Ending(137), 1),  # the first one's workers noticed that the second is gone, and ended sooner
        (Ending(137), Ending(1, is_out_of_memory=True), 1),
        (Ending(1), Ending(2), 1),
        (Ending(2), Ending(1), 0),
        (Ending(137), Ending(1), 0),
        (Ending(1), Ending(4), 0),
        (Ending(1), Ending(1, lost="the engine is gone"), 1),
    ],
)
def test_who_failed(first: Ending, second: Ending, guilty: int) -> None:
    """One fails, and all end: the other is asked to."""
    fakes = Fake([], first), Fake([], second, waits=True)
    group, _ = listen(*fakes)
    assert group.failed() is group.members[guilty]
    assert fakes[1].calls == ["asked", "removed"]


def test_stop_reaches_all_and_kills_the_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.launch.docker_group.END_SECONDS", 0.0)
    stop = threading.Event()
    stop.set()
    fakes = Fake([], Ending(4), waits=True), Fake([], Ending(137), waits=True, deaf=True)
    group, _ = listen(*fakes, stop=stop)
    assert [fake.calls for fake in fakes] == [["asked", "removed"], ["asked", "killed", "removed"]]
    assert group.is_stopped
    assert group.failed() is group.members[0]


def test_what_was_done_when_it_was_stopped_is_done() -> None:
    stop = threading.Event()
    stop.set()
    group, _ = listen(Fake([], Ending(0), waits=True), stop=stop)
    assert group.failed() is None


def test_all_machines_are_heard_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log file as in the UI, each line says where it is from. The second one begins when the first says so."""
    fakes = Fake(["a", f'{EVENT_PREFIX}{{"event": "join"}}', "b"], Ending(0), waits=True), Fake(["a", "b"], Ending(0))
    asked = config(tmp_path)
    job = StageJob("download-model", "download", tmp_path / "spec.json", tmp_path / "logs" / "stage.log", "brisk-otter")
    job.spec_file.write_text(SPECS[job.node].of(asked).model_dump_json())
    launcher, lines = DockerLauncher(asked, grace=1.0), list[str]()

    def started(job: StageJob, spec: Any, engine: Engine, place: int, grace: float) -> Fake:
        if place == 1:
            fakes[0].may_end.set()
        return fakes[place]

    engines = [Engine(f"host-{number}", None, Image("i", "i", "i")) for number in range(2)]
    monkeypatch.setattr(launcher, "_engines", lambda *asked: engines)
    monkeypatch.setattr(launcher, "_places", lambda *asked: contextlib.nullcontext([0, 1]))
    monkeypatch.setattr(launcher, "_started", started)
    launcher.run(job, Caller(lines.append, print, threading.Event()))
    assert sorted(lines) == ["[node 0] a", "[node 0] b", "[node 1] a", "[node 1] b"]
    assert job.log_file.read_text().splitlines() == lines


# The shim in a container


def start_shim(code: str) -> subprocess.Popen[bytes]:
    """A piece of Python behind the shim, as in a container."""
    command = [sys.executable, "-I", "-S", str(SHIM), "--grace", "5", "--in-container", "--", sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_shim_takes_an_environment_and_ends_with_its_owner() -> None:
    """Both outputs come out of one, in order."""
    shim = start_shim(
        "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(4)); print('a', flush=True)\n"
        "print(os.environ['A'], file=sys.stderr, flush=True); print('b', flush=True); time.sleep(60)"
    )
    assert shim.stdin is not None
    assert shim.stdout is not None
    shim.stdin.write(b'{"A": "secret"}\n')
    shim.stdin.flush()
    assert [shim.stdout.readline() for _ in range(3)] == [b"a\n", b"secret\n", b"b\n"]
    assert shim.communicate(timeout=60) == (b"", b"")  # closes its input, as the engine does when the owner is gone
    assert shim.returncode == 4


def test_a_shim_whose_owner_was_gone_before_it_said_anything() -> None:
    shim = start_shim("print('runs')")
    assert shim.communicate(timeout=60) == (b"", b"")
    assert shim.returncode == 128 + signal.SIGTERM
