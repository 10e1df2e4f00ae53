"""The launcher with real containers: what a stage sees there, how it ends, and that nothing outlives its launcher."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError
from processes import wait_until
from scripted import config_of, containers_of, scripted
from traces import in_files
from watched import Watched

from flows.launch.docker import DockerLauncher
from flows.launch.docker_checks import Image
from flows.launch.docker_request import Place
from flows.launch.protocol import Progress, StageFailed
from flows.records.flock import is_locked
from flows.records.run_record import RunFolder
from flows.records.server_home import server_home
from stages.contracts.specs import SPECS

TOKEN = "hf_averysecrettokenofsomebody"

# Says what it is given and what it may do, then waits for somebody to look at it from outside.
LOOK = """
import json, os, pathlib, subprocess, sys, time
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
def may_write(path):
    try:
        pathlib.Path(path, "x").write_text("x")
        return True
    except OSError:
        return False
program = pathlib.Path("/tmp/program")  # as compilers write there what is then run
program.write_text("#!/bin/sh\\nexit 7\\n")
program.chmod(0o700)
print("@@look " + json.dumps({
    "token": os.environ.get("HF_TOKEN"), "prefect": [name for name in os.environ if name.startswith("PREFECT")],
    "user": [os.getuid(), os.getgid()], "home": os.path.expanduser("~"), "cwd": os.getcwd(),
    "capabilities": status["CapEff"].strip(), "no_new_privileges": status["NoNewPrivs"].strip(),
    "networks": sorted(os.listdir("/sys/class/net")), "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "writes": {path: may_write(path) for path in ("/", "/opt", "/usr", "/tmp", os.path.expanduser("~"), WORKSPACE)},
    "runs": subprocess.run([program]).returncode, "image": os.environ["STAGE_IMAGE"],
    "threads": os.environ.get("OMP_NUM_THREADS"), "prefect_home": os.listdir(WORKSPACE + "/prefect"),
}))
print("the token is", os.environ.get("HF_TOKEN"), flush=True)
print('@@stage {"event": "progress", "done": 1, "total": 4, "text": "going"}', flush=True)
print("to stderr", file=sys.stderr, flush=True)
while not os.path.exists(WORKSPACE + "/seen"):
    time.sleep(0.01)  # a file tells nobody that it is there
"""


def look(client: Any, workspace: Path, node: str) -> tuple[Watched, dict[str, Any], dict[str, Any]]:
    """Run LOOK as a stage: what was heard, what the stage saw, and what the engine tells of its container."""
    watched = scripted(workspace, f"WORKSPACE = {str(workspace)!r}\n{LOOK}", node=node)
    inspected: list[dict[str, Any]] = []

    def on_line(line: str) -> None:
        watched.lines.append(line)
        if line == "to stderr":
            inspected.extend(container.attrs for container in containers_of(client, workspace))
            (workspace / "seen").touch()

    watched.on_line = on_line
    watched.run()
    assert len(inspected) == 1
    return watched, json.loads(watched.lines[0].removeprefix("@@look ")), inspected[0]


def test_what_a_stage_has_and_may(client: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:password")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text('{"proxies": {"default": {"httpsProxy": "http://me:password@proxy"}}}')
    database = server_home(workspace) / "prefect.db"
    database.parent.mkdir()
    database.touch()
    watched, saw, told = look(client, workspace, "convert")
    assert watched.lines[1:] == ["the token is None", "to stderr"]
    assert watched.progress == [Progress(1, 4, "going")]
    assert watched.job.log_file.read_text().splitlines() == watched.lines
    assert (saw["token"], saw["prefect"], saw["threads"]) == (None, [], "1")
    assert "password" not in str(told["Config"]["Env"])
    assert (saw["prefect_home"], database.exists()) == ([], True)  # the server's, in the workspace, is hidden
    assert saw["user"] == [os.getuid(), os.getgid()]
    assert saw["runs"] == 7
    assert (saw["home"], saw["cwd"]) == (str(Path.home()), str(Path.cwd()))
    assert (int(saw["capabilities"], 16), saw["no_new_privileges"], saw["networks"]) == (0, "1", ["lo"])
    assert saw["shm"] == 64_000_000 // 4096 * 4096
    able = {path for path, able in saw["writes"].items() if able}
    assert able == {"/tmp", str(Path.home()), str(workspace)}
    assert saw["image"].removeprefix("sha256:") in told["Image"]
    labels = {name: value for name, value in told["Config"]["Labels"].items() if name.startswith("megatron-flows.")}
    assert labels["megatron-flows.run"] == "brisk-otter"
    assert labels["megatron-flows.stage"] == "convert"
    assert len(labels["megatron-flows.attempt"]) == 32
    assert containers_of(client, workspace) == []  # it was removed


def test_the_token_reaches_push_and_nobody_else(client: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the engine nor the list of processes shows it, nor what was printed of it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    seen: list[str] = []
    original = containers_of

    def inspect(client: Any, workspace: Path) -> list[Any]:
        found = original(client, workspace)
        seen.extend(json.dumps([container.attrs, container.top()]) for container in found)
        with pytest.raises(APIError, match="does not support reading"):  # the engine keeps no log
            found[0].logs()
        return found

    monkeypatch.setattr(sys.modules[__name__], "containers_of", inspect)
    watched, saw, _ = look(client, workspace, "push")
    assert saw["token"] == "[hidden]"  # it has it, and what it prints is redacted
    assert watched.lines[1] == "the token is [hidden]"
    assert "eth0" in saw["networks"]
    assert seen
    assert TOKEN not in "".join(seen) + watched.job.log_file.read_text()
    assert in_files(TOKEN, workspace) == []


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        (
            "import os; print('going'); print('busy', flush=True); os.kill(os.getpid(), 9)", "killed",
            "killed (SIGKILL) from outside: by somebody, or by the kernel, where the machine is out of memory. "
            "Its last lines: going ⏎ busy",
        ),
        ("print('@@stage {\"event\": \"error\", \"message\": \"no file\"}'); raise SystemExit(2)", "bad input", "no file"),
        ("print('@@stage {\"event\": \"error\", \"message\": \"no RoPE\"}'); raise SystemExit(3)", "gate failed", "no RoPE"),
    ],
)  # fmt: skip
def test_exit_codes_in_words(workspace: Path, code: str, reason: str, says: str) -> None:
    watched = scripted(workspace, code)
    with pytest.raises(StageFailed) as caught:
        watched.run()
    assert caught.value.reason == reason
    assert str(caught.value) == f"train: {says}"


def test_out_of_memory_is_told_as_such(workspace: Path) -> None:
    code = "print('filling', flush=True)\nfull = []\nwhile True: full.append(bytearray(8 << 20))"
    watched = scripted(workspace, code, memory="96MB")
    with pytest.raises(StageFailed) as caught:
        watched.run()
    assert caught.value.reason == "out of memory"
    assert str(caught.value) == (
        "train: the kernel killed it, out of memory: launch.memory is 96.0 MB. Raise launch.memory. Its last lines: filling"
    )


def test_no_line_is_lost(workspace: Path) -> None:
    """From the first, before anybody could have listened, to the last, and however many there are."""
    watched = scripted(workspace, "for i in range(100_000): print(i, 'x' * 60)")
    watched.run()
    assert [int(line.split()[0]) for line in watched.lines] == list(range(100_000))


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.2)  # it takes a while: a launcher that did not wait would be gone
    pathlib.Path({saved!r}).touch()
    print("saved", flush=True)
    sys.exit(4)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


def test_stop_lets_the_stage_save_its_work(client: Any, workspace: Path) -> None:
    watched = scripted(workspace, SAVES.format(saved=str(workspace / "saved")), grace=60)
    watched.on_line = lambda line: watched.stop.set() if line == "ready" else watched.lines.append(line)
    with pytest.raises(StageFailed, match="stopped") as caught:
        watched.run()
    assert caught.value.reason == "interrupted"
    assert watched.lines == ["saved"]
    assert (workspace / "saved").exists()
    assert containers_of(client, workspace) == []
    with pytest.raises(StageFailed, match="not started"):
        watched.run()


def test_stop_kills_what_does_not_listen(client: Any, workspace: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    watched = scripted(workspace, code, grace=0.3)
    watched.on_line = lambda line: watched.stop.set()
    with pytest.raises(StageFailed, match="stopped"):
        watched.run()
    assert containers_of(client, workspace) == []


def test_a_failing_handler_ends_the_stage(client: Any, workspace: Path) -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    watched = scripted(workspace, SAVES.format(saved=str(workspace / "saved")))
    watched.on_line = fail
    with pytest.raises(RuntimeError, match="ready"):
        watched.run()
    assert (workspace / "saved").exists()
    assert containers_of(client, workspace) == []


def test_a_container_that_is_removed_from_outside(client: Any, workspace: Path) -> None:
    watched = scripted(workspace, "import time; print('ready', flush=True); time.sleep(600)")
    watched.on_line = lambda line: containers_of(client, workspace)[0].remove(force=True)
    with pytest.raises(StageFailed, match=r"removed from outside|killed") as caught:
        watched.run()
    assert caught.value.reason == "killed"


LAUNCH = """
import dataclasses, fcntl, os, sys
from pathlib import Path
sys.path[:0] = {path!r}
from scripted import scripted
watched = scripted(Path({workspace!r}), {code!r}, grace=60)
lock = os.open({workspace!r} + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
watched.job = dataclasses.replace(watched.job, holds=(lock,))
watched.on_line = lambda line: print(line, flush=True)
watched.run()
"""


def launch(workspace: Path, code: str) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, whose stage is ready."""
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "flows")]
    source = LAUNCH.format(path=path, workspace=str(workspace), code=code)
    launcher = subprocess.Popen([sys.executable, "-c", source], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    return launcher


def test_kill_9_of_the_launcher(client: Any, workspace: Path) -> None:
    """The stage saves its work and ends, although nobody is left to ask for it. The next start finds what remains, by its
    labels, and removes it."""
    launcher = launch(workspace, SAVES.format(saved=str(workspace / "saved")))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: all(container.status == "exited" for container in containers_of(client, workspace)))
    assert (workspace / "saved").exists()
    (left,) = containers_of(client, workspace)
    again = scripted(workspace, "print('again')")
    again.run()
    assert again.lines == ["again"]
    assert containers_of(client, workspace) == []
    assert left.id not in {container.id for container in client.containers.list(all=True)}


def test_what_still_saves_its_work_is_waited_for(client: Any, workspace: Path) -> None:
    slow = SAVES.replace("time.sleep(0.2)", f"while not pathlib.Path({str(workspace / 'go')!r}).exists(): time.sleep(0.01)")
    launcher = launch(workspace, slow.format(saved=str(workspace / "saved")))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert is_locked(workspace / "lock")  # what the launcher held is not free before its container has ended
    impatient = scripted(workspace, "")
    impatient.on_line = lambda line: impatient.stop.set()
    with pytest.raises(StageFailed, match="not started"):  # at once, and not after the grace period
        impatient.run()
    assert not (workspace / "saved").exists()
    again = scripted(workspace, "print('again')")

    def on_line(line: str) -> None:
        again.lines.append(line)
        (workspace / "go").touch()

    again.on_line = on_line
    again.run()
    assert (workspace / "saved").exists()
    assert "which an earlier run left, to save its work and end" in again.lines[0]
    assert again.lines[1:] == ["again"]
    wait_until(lambda: not is_locked(workspace / "lock"))


def test_a_live_run_is_left_alone(client: Any, workspace: Path) -> None:
    first = scripted(workspace, SAVES.format(saved=str(workspace / "saved")), grace=60)
    ready = threading.Event()
    first.on_line = lambda line: ready.set()

    def run() -> None:
        with RunFolder(workspace, first.job.run).held(), pytest.raises(StageFailed, match="stopped"):
            first.run()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    other = scripted(workspace, "print('beside it')")
    other.job = dataclasses.replace(other.job, run="calm-heron")
    other.run()
    assert other.lines == ["beside it"]
    assert [container.status for container in containers_of(client, workspace)] == ["running"]
    first.stop.set()
    thread.join()


def test_limits_as_the_engine_has_them(client: Any, workspace: Path) -> None:
    """What is asked for reaches the engine. GPUs are asked for and not started: there are none here. How many, and which, is in
    test_launch_docker."""

    def asked(**launch: Any) -> dict[str, Any]:
        launcher = DockerLauncher(config_of(workspace, **({"image": "megatron-flows:cpu"} | launch)))
        job = scripted(workspace, "").job
        spec = SPECS["train"].model_validate_json(job.spec_file.read_bytes())
        image = Image("megatron-flows:cpu", client.images.get("megatron-flows:cpu").id, "")
        container = client.containers.create(**launcher.request(job, spec, image, Place(), 5.0))
        try:
            return dict(container.attrs["HostConfig"])
        finally:
            container.remove()

    limits = asked(memory="2GB", cpus=1.5, shm_size="1GB", ulimits={"stack": 1 << 26})
    assert (limits["Memory"], limits["MemorySwap"], limits["NanoCpus"]) == (2_000_000_000, 2_000_000_000, 1_500_000_000)
    assert limits["ShmSize"] == 1_000_000_000
    assert limits["Ulimits"] == [{"Name": "stack", "Soft": 1 << 26, "Hard": 1 << 26}]
    assert (limits["ReadonlyRootfs"], limits["CapDrop"], limits["SecurityOpt"]) == (True, ["ALL"], ["no-new-privileges"])
    assert (limits["NetworkMode"], limits["Init"], limits["LogConfig"]["Type"]) == ("none", True, "none")
    assert asked(ipc="host")["IpcMode"] == "host"
    every = asked(gpus="all")
    assert every["DeviceRequests"][0]["Count"] == -1
    assert every["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert {limit["Name"] for limit in every["Ulimits"]} == {"memlock", "stack"}
