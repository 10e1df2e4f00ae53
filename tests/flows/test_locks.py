"""Turns: trainings on the same GPUs one after the other, and what a holder's death means for those who wait."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import wait_until
from watched import doing

from flows.launch import choose
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, StageFailed, StageJob
from flows.records import locks
from flows.records.flock import is_locked
from flows.records.locks import Lock, Stopped, held, in_turn, locks_of, wait_until_free
from stages.contracts import launch_settings
from stages.contracts.launch_settings import Gpus, LaunchSettings

HOLD = """
import sys, threading
from pathlib import Path
from flows.records.flock import is_locked
from flows.records.locks import Lock, held
with held([Lock(Path(sys.argv[1]), "it")], "run brisk-otter", stop=threading.Event(), on_wait=print) as descriptors:
    print("held", flush=True)
    if len(sys.argv) > 2:
        import subprocess
        child = subprocess.Popen(["sleep", "600"], pass_fds=descriptors)
        print(child.pid, flush=True)
    sys.stdin.read()
"""


def holder(file: Path, *child: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), *child], cwd=Path(__file__).parents[2], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "MACHINE", tmp_path / "machine")
    return tmp_path / "machine"


class Waiter:
    """A thread that takes locks as soon as it can, and keeps them until it is told."""

    def __init__(self, *wanted: Lock) -> None:
        self.stop, self.has, self.leave = threading.Event(), threading.Event(), threading.Event()
        self.told: list[str] = []
        self.stopped = False
        self.thread = threading.Thread(target=self._run, args=[wanted], daemon=True)
        self.thread.start()

    def _run(self, wanted: tuple[Lock, ...]) -> None:
        try:
            with held(wanted, "run calm-heron", stop=self.stop, on_wait=self.told.append):
                self.has.set()
                self.leave.wait()
        except Stopped:
            self.stopped = True


def test_who_waits_says_for_whom_and_gets_it_when_the_holder_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    waiter = Waiter(Lock(tmp_path / "lock", "the GPUs"))
    wait_until(lambda: len(waiter.told) > 1)
    assert set(waiter.told) == {"waiting for the GPUs: run brisk-otter has it"}
    assert not waiter.has.is_set()
    process.kill()
    process.wait()
    assert waiter.has.wait(60)
    assert (tmp_path / "lock").read_text() == "run calm-heron"
    waiter.leave.set()


def test_what_inherits_a_lock_holds_it(tmp_path: Path) -> None:
    """A stage that saves a checkpoint after its run was killed still has the GPUs."""
    process = holder(tmp_path / "lock", "with a child")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    waiter = Waiter(Lock(tmp_path / "lock", "the GPUs"))
    wait_until(lambda: len(waiter.told) > 1)
    os.kill(child, signal.SIGKILL)
    assert waiter.has.wait(60)
    waiter.leave.set()


def test_a_stage_holds_the_locks_of_its_run(tmp_path: Path) -> None:
    """Were the run's process killed, what ends the stage would have them until it has ended."""
    stop = threading.Event()
    with held([Lock(tmp_path / "lock", "it")], "me", stop=threading.Event(), on_wait=print) as descriptors:
        job = StageJob("train", "train", tmp_path / "train.json", tmp_path / "train.log", "brisk-otter", holds=descriptors)
        stage = threading.Thread(target=run_until_stopped, args=[job, stop], daemon=True)
        stage.start()
        wait_until(lambda: job.log_file.exists() and "began" in job.log_file.read_text())
    waiter = Waiter(Lock(tmp_path / "lock", "it"))
    wait_until(lambda: waiter.has.is_set() or len(waiter.told) > 1)
    had_it_at_once = waiter.has.is_set()
    stop.set()
    assert waiter.has.wait(60)
    waiter.leave.set()
    stage.join(60)
    assert not had_it_at_once


def run_until_stopped(job: StageJob, stop: threading.Event) -> None:
    with contextlib.suppress(StageFailed):
        doing(["sh", "-c", "echo began; sleep 600"], ProcessLauncher(grace=5.0)).run(job, Caller(print, print, stop))


def test_a_stage_that_is_a_process_sees_its_gpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    job = StageJob("train", "train", tmp_path / "train.json", tmp_path / "train.log", "brisk-otter")
    lines: list[str] = []
    for launcher in (ProcessLauncher(visible_gpus="1"), ProcessLauncher(visible_gpus=""), ProcessLauncher()):
        doing(["sh", "-c", 'echo "sees $CUDA_VISIBLE_DEVICES"'], launcher).run(
            job, Caller(lines.append, print, threading.Event())
        )
    assert lines == ["sees 1", "sees ", "sees 0,1,2"]


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    with held([Lock(tmp_path / "lock", "it")], "me", stop=threading.Event(), on_wait=print):
        waiter = Waiter(Lock(tmp_path / "lock", "it"))
        wait_until(lambda: bool(waiter.told))
        waiter.stop.set()
        waiter.thread.join(60)
        assert waiter.stopped


def go_together(first: list[Lock], second: list[Lock]) -> bool:
    """Whether who wants the second locks has them while others hold the first."""
    with held(first, "first", stop=threading.Event(), on_wait=print):
        waiter = Waiter(*second)
        wait_until(lambda: waiter.has.is_set() or bool(waiter.told))
        has_them = waiter.has.is_set()
        waiter.stop.set()
        waiter.leave.set()
        waiter.thread.join(60)
    return has_them


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (Gpus(count=-1), Gpus(count=-1), False),
        (Gpus(count=2), Gpus(count=1), False),  # nobody knows which ones these are
        (Gpus(count=-1), Gpus(ids=("0",)), False),
        (Gpus(ids=("0", "1")), Gpus(ids=("1", "2")), False),
        (Gpus(ids=("0", "1")), Gpus(ids=("3", "2")), True),
        (Gpus(ids=("0",)), Gpus(ids=("GPU-5c1",)), False),  # that may be GPU 0
        (Gpus(), Gpus(), False),
        (Gpus(), Gpus(count=-1), True),
    ],
)
def test_who_waits_for_whom(tmp_path: Path, one: Gpus, other: Gpus, together: bool) -> None:
    assert go_together(locks_of("train", tmp_path, one), locks_of("train", tmp_path, other)) == together


def test_other_workspaces_train_on_the_cpu_meanwhile(tmp_path: Path) -> None:
    assert locks_of("train", tmp_path / "a", Gpus()) != locks_of("train", tmp_path / "b", Gpus())
    assert locks_of("train", tmp_path / "a", Gpus(count=-1)) == locks_of("train", tmp_path / "b", Gpus(count=-1))


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (["ssh://me@gpu1"], ["ssh://me@gpu2"], True),
        (["ssh://me@gpu1", "ssh://me@gpu2"], ["tcp://gpu2:2376"], False),  # another way to the same machine
        (["ssh://me@gpu1", "ssh://me@gpu2"], ["ssh://gpu2", "ssh://gpu1"], False),
        (["ssh://me@gpu1", "unix:///var/run/docker.sock"], [], False),  # of this machine
        (["unix:///run/docker.sock", "unix:///run/docker.sock"], ["ssh://localhost"], False),  # nor does it wait for itself
        (["ssh://me@gpu1"], [], True),
    ],
)
@pytest.mark.parametrize("gpus", [Gpus(count=-1), Gpus(ids=("0",))])
def test_runs_on_other_machines_wait_for_the_gpus_there(
    tmp_path: Path, gpus: Gpus, one: list[str], other: list[str], together: bool
) -> None:
    assert go_together(*(locks_of("train", tmp_path, gpus, engines) for engines in (one, other))) == together


def test_what_is_waited_for_on_other_machines(tmp_path: Path) -> None:
    """In the same order by everybody, whatever the order of `launch.hosts`."""
    locks = locks_of("train", tmp_path, Gpus(ids=("1", "0")), ["ssh://gpu2", "unix:///x", "ssh://me@GPU1:2222"])
    assert [lock.file.name for lock in locks] == [
        "gpus", "gpu-0", "gpu-1", "gpus@gpu1", "gpu-0@gpu1", "gpu-1@gpu1", "gpus@gpu2", "gpu-0@gpu2", "gpu-1@gpu2",
    ]  # fmt: skip
    assert [lock.what for lock in locks[2:5]] == ["GPU 1", "the GPUs of gpu1", "GPU 0 of gpu1"]
    hosts = ("ssh://gpu1", "ssh://gpu2")
    assert choose.engines_of("train", LaunchSettings(hosts=hosts)) == hosts
    assert choose.engines_of("verify", LaunchSettings(hosts=hosts)) == hosts[:1]


def test_every_stage_that_computes_waits_for_the_gpus(tmp_path: Path) -> None:
    for stage in ("verify", "export"):
        assert locks_of(stage, tmp_path, Gpus(ids=("0",))) == locks_of("train", tmp_path, Gpus(ids=("0",)))
        assert locks_of(stage, tmp_path, Gpus()) == []
    assert locks_of("preprocess", tmp_path, Gpus(count=-1)) == []


@pytest.mark.parametrize(
    ("gpus", "visible", "seen", "locked"),
    [
        ("device=0", None, "0", ("0",)),
        ("device=2,3", "0,1", "2,3", ("2", "3")),
        ("none", "0,1", "", ()),
        ("2", "4,5,6", "4,5", ("4", "5")),
        ("2", None, "0,1", ("0", "1")),
        ("all", "1", "1", ("1",)),
        ("auto", None, None, ()),
    ],
)
def test_the_gpus_that_processes_see_are_those_that_are_locked(
    gpus: str, visible: str | None, seen: str | None, locked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    settings = LaunchSettings(by="process", gpus=gpus)
    assert settings.visible_to_processes(visible) == seen
    found = choose.gpus_in_use(settings, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert found == (Gpus(count=-1) if seen is None else Gpus(ids=locked))


def test_the_machine_s_locks_are_everybody_s(tmp_path: Path, machine: Path) -> None:
    with held(locks_of("train", tmp_path, Gpus(ids=("0",))), "me", stop=threading.Event(), on_wait=print):
        assert machine.stat().st_mode & 0o7777 == 0o1777
        assert {file.name: file.stat().st_mode & 0o777 for file in machine.iterdir()} == {"gpus": 0o666, "gpu-0": 0o666}
    (machine / "gpu-0").unlink()
    (machine / "gpu-0").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OSError, match="symbolic links"),
        held(locks_of("train", tmp_path, Gpus(ids=("0",))), "me", stop=threading.Event(), on_wait=print),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_folder_of_the_machine_s_locks_is_no_link(tmp_path: Path, machine: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    machine.symlink_to(elsewhere)
    wanted = locks_of("train", tmp_path, Gpus(count=-1))
    with pytest.raises(OSError, match="Not a directory"), held(wanted, "me", stop=threading.Event(), on_wait=print):
        pass
    assert (elsewhere.stat().st_mode & 0o7777, list(elsewhere.iterdir())) == (0o700, [])


def test_of_those_who_share_nobody_is_told_nor_who_had_it_before(tmp_path: Path) -> None:
    everything, one = Gpus(count=-1), Gpus(ids=("0",))
    with held(locks_of("train", tmp_path, everything), "run long-gone", stop=threading.Event(), on_wait=print):
        pass
    with held(locks_of("train", tmp_path, one), "run brisk-otter", stop=threading.Event(), on_wait=print):
        waiter = Waiter(*locks_of("train", tmp_path, everything))
        wait_until(lambda: bool(waiter.told))
        assert set(waiter.told) == {"waiting for the GPUs of this machine"}
        waiter.stop.set()
        waiter.thread.join(60)


def test_who_waited_for_a_gpu_looks_again_who_makes_the_result(tmp_path: Path) -> None:
    """Another run began the same work on another GPU meanwhile: its scratch is not touched, the GPU not kept from others."""
    gpu, result = tmp_path / "gpu", tmp_path / "result"
    said: list[str] = []
    prepared, has, leave = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with in_turn(
            result, [Lock(gpu, "GPU 0")], "me", stop=threading.Event(), on_wait=said.append, maker=lambda: "run calm-heron",
            prepare=prepared.set,
        ):  # fmt: skip
            has.set()
            leave.wait(60)

    trains = holder(gpu)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wait_until(lambda: bool(said))
    other = holder(result)
    trains.communicate()
    wait_until(lambda: said[-1] == "waiting: run calm-heron is making this result")
    assert not is_locked(gpu)
    assert not prepared.is_set()
    other.communicate()
    assert has.wait(60)
    assert prepared.is_set()
    assert is_locked(gpu)
    assert not is_locked(result), "it is the stage that holds it"
    leave.set()
    thread.join(60)


def test_waiting_without_taking(tmp_path: Path) -> None:
    told = threading.Event()
    wait_until_free(tmp_path / "lock", stop=threading.Event(), on_wait=told.set)
    assert not told.is_set()
    process = holder(tmp_path / "lock")
    thread = threading.Thread(
        target=wait_until_free, args=[tmp_path / "lock"], kwargs={"stop": threading.Event(), "on_wait": told.set}, daemon=True
    )
    thread.start()
    assert told.wait(60)
    assert thread.is_alive()
    process.communicate()
    thread.join(60)
    assert not thread.is_alive()
