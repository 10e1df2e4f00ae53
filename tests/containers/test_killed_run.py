"""A run that is killed while it trains in a container: its GPUs are nobody else's before that has ended; nothing is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fake_stages import make_results
from processes import is_locked, wait_until
from scripted import IN_CONTAINERS, containers_of

from flows.asked.load_config import load_config
from flows.records.run_record import RunFolder
from flows.server.local import Server

ROOT = Path(__file__).parents[2]
CONFIG = "model: {source: somebody/model}\ndata: {source: somebody/data}\ntrain: {steps: 2, sequence_length: 16}\n"
TRAINING = """
import os, signal, time
asked = []
signal.signal(signal.SIGTERM, lambda *arguments: asked.append(True))
open("WORKSPACE/trains", "w").close()
while not asked:
    time.sleep(0.05)  # a training takes its time
open("WORKSPACE/saves", "w").close()
while not os.path.exists("WORKSPACE/saved"):
    time.sleep(0.05)  # a file tells nobody that it is there
"""
FINETUNE = """
import sys
from scripted import Scripted
from flows import cli
from flows.launch import choose
code = sys.argv.pop()
choose.launcher_for = lambda config: Scripted(config, code, grace=120.0)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_s_container(client: Any, workspace: Path, server: Server) -> None:
    (workspace / "mine.yaml").write_text(CONFIG)
    launch = [f"launch.{name}={value}" for name, value in IN_CONTAINERS.items()]
    make_results(load_config(workspace / "mine.yaml", [f"workspace={workspace}", *launch]), until="verify")
    options = [part for setting in launch for part in ("--set", setting)]
    path = os.pathsep.join(str(ROOT / "tests" / part) for part in ("containers", "flows"))
    run = subprocess.Popen(
        [sys.executable, "-c", FINETUNE, "run", "mine.yaml", "--workspace", str(workspace), "--name", "brisk-otter", *options,
         TRAINING.replace("WORKSPACE", str(workspace))],
        cwd=workspace, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "PREFECT_API_URL": server.api},
        start_new_session=True,
    )  # fmt: skip
    wait_until((workspace / "trains").exists, 120)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    wait_until((workspace / "saves").exists, 60)  # the container is asked to end, and saves its work
    record = RunFolder(workspace, "brisk-otter").read()
    assert record is not None
    assert record.state == "crashed"
    assert is_locked(workspace / ".training")
    (workspace / "saved").touch()
    wait_until(lambda: containers_of(client, workspace) == [], 90)
    wait_until(lambda: not is_locked(workspace / ".training"), 60)
