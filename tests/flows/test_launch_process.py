"""The launcher with real processes: exit codes, graceful stops, and that nothing outlives it, whatever kills it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import lives, wait_until
from watched import Watched, doing

from flows.launch.process import ProcessLauncher, shim_command
from flows.launch.protocol import Progress, StageFailed, StageJob

PYTHON = [sys.executable, "-c"]


def scripted(tmp_path: Path, code: str, grace: float = 5.0, *, talks_to_hub: bool = False) -> Watched:
    """A launch of a piece of Python."""
    log = tmp_path / "logs" / "stage.log"
    job = StageJob("push", "push", tmp_path / "spec.json", log, "brisk-otter", talks_to_hub=talks_to_hub)
    return Watched(doing([*PYTHON, code], ProcessLauncher(grace=grace)), job)


def pids(file: Path, count: int) -> list[int]:
    """The process ids in a file, once there are so many."""
    wait_until(lambda: file.exists() and len(file.read_text().split()) >= count)
    return [int(word) for word in file.read_text().split()]


# A stage that has a child in a session of its own (as torchrun's workers are), which has a child: all ignore SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
file, depth = {file!r}, int(os.environ.get("DEPTH", "0"))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if depth < 2:
    os.environ["DEPTH"] = str(depth + 1)
    subprocess.Popen([sys.executable, "-c", {again}], start_new_session=True)
with open(file, "a") as f:
    f.write(f"{{os.getpid()}} ")
{then}
"""


def family(file: Path, then: str = "time.sleep(600)") -> str:
    """The source of FAMILY; `then` is what the first of them does."""
    child = FAMILY.format(file=str(file), again="sys.argv[1], sys.argv[1]", then="time.sleep(600)")
    return FAMILY.format(file=str(file), again=f"{child!r}, {child!r}", then=then)


def test_output_progress_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    code = """
import os, sys
print("token", os.environ.get("HF_TOKEN"), os.environ["STAGE_EVENTS"])
print('@@stage {"event": "progress", "done": 1, "total": 4, "text": "going"}')
print('@@stage {"event": "progress", "done": "x", "total": null}')
print('@@stage {broken')
print("to stderr", file=sys.stderr)
"""
    push = scripted(tmp_path, code, talks_to_hub=True)
    push.run()
    assert push.lines == ["token [hidden] 1", "@@stage {broken", "to stderr"]
    assert push.job.log_file.read_text().splitlines() == push.lines
    assert push.progress == [Progress(1, 4, "going")]
    dry = scripted(tmp_path, code)
    dry.run()
    assert dry.lines[0] == "token None 1"


def test_failure_carries_the_stage_s_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    code = """
import sys
print('@@stage {"event": "error", "message": "gate failed at layer 14 with a-secret-token", "code": 3}')
sys.exit(3)
"""
    watched = scripted(tmp_path, code)
    with pytest.raises(StageFailed) as caught:
        watched.run()
    assert str(caught.value) == "push: gate failed at layer 14 with [hidden]"
    assert (caught.value.reason, caught.value.code, caught.value.log_file) == ("gate failed", 3, watched.job.log_file)


def test_killed_by_the_kernel(tmp_path: Path) -> None:
    watched = scripted(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StageFailed, match="out of memory") as caught:
        watched.run()
    assert caught.value.reason == "killed"


def test_children_left_by_a_stage_are_ended(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    wait = f"while len(open({str(file)!r}).read().split()) < 3: time.sleep(0.01)"
    scripted(tmp_path, family(file, then=wait)).run()
    assert not any(map(lives, pids(file, 3)))


def test_stop_lets_the_stage_save_its_work(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
def save(*_):
    print("saving")
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(4)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
    watched = scripted(tmp_path, code)
    watched.on_line = lambda line: watched.stop.set() if line == "ready" else watched.lines.append(line)
    with pytest.raises(StageFailed, match="stopped") as caught:
        watched.run()
    assert caught.value.reason == "interrupted"
    assert (tmp_path / "saved").exists()
    assert watched.lines == ["saving"]
    with pytest.raises(StageFailed, match="not started"):
        watched.run()


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    watched = scripted(tmp_path, family(file), grace=0.3)
    stopper = threading.Thread(target=lambda: (pids(file, 3), watched.stop.set()))
    stopper.start()
    with pytest.raises(StageFailed, match="stopped"):
        watched.run()
    stopper.join()
    assert not any(map(lives, pids(file, 3)))


def test_a_failing_handler_ends_the_stage(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    watched = scripted(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    watched.on_line = fail
    with pytest.raises(RuntimeError) as caught:
        watched.run()
    assert not lives(int(str(caught.value)))


LAUNCH = """
import sys, threading
from pathlib import Path
sys.path[:0] = {path!r}
from watched import doing
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, StageJob
job = StageJob("train", "train", Path("spec.json"), Path({log!r}), "brisk-otter")
doing({command!r}, ProcessLauncher(grace=0.3)).run(job, Caller(print, print, threading.Event()))
"""


@pytest.mark.parametrize("how", ["the launcher", "its whole process group", "the shim"])
def test_kill_9_leaves_no_orphan(tmp_path: Path, how: str) -> None:
    file = tmp_path / "pids"
    then = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(600)" if how == "the shim" else "time.sleep(600)"
    source = LAUNCH.format(
        path=[str(Path(__file__).parent), str(Path(__file__).parents[2])],
        log=str(tmp_path / "log"),
        command=[*PYTHON, family(file, then)],
    )
    launcher = subprocess.Popen([*PYTHON, source], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        family_pids = pids(file, 3)
        stage = min(family_pids)  # the first born
        if how == "the launcher":
            os.kill(launcher.pid, signal.SIGKILL)
        elif how == "its whole process group":
            os.killpg(launcher.pid, signal.SIGKILL)
        else:
            shim = int(Path(f"/proc/{stage}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(shim, signal.SIGKILL)
            # Nobody is left to end the grandchildren, but the stage itself, which owns them, is told to stop.
            wait_until(lambda: not lives(stage))
            return
        wait_until(lambda: not any(map(lives, family_pids)))
    finally:
        launcher.kill()
        launcher.wait()
        for pid in file.read_text().split() if file.exists() else []:
            if lives(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def test_sigterm_to_the_shim_is_passed_on(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(4)); print('ready', flush=True); time.sleep(600)"
    shim = subprocess.Popen(
        shim_command([*PYTHON, code], grace=20), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert shim.stdout is not None
    assert shim.stdout.readline() == b"ready\n"
    shim.terminate()
    assert shim.wait(timeout=20) == 4
