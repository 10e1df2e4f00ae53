"""`finetune ui`: server and runner with one command, a server that dies in the middle of a run, and nobody outside is asked."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from processes import wait_until
from runners import Seen, Serving

from flows.server import local as servers

HERE = re.compile(r"(127\.0\.0\.1|localhost|::1|0\.0\.0\.0|None)(:\d+)?|unix:.*")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def test_server_and_runner(tmp_path: Path, put_database: Callable[[Path], None]) -> None:
    watching = tmp_path / "watching"
    shutil.copytree(Path(__file__).with_name("watching"), watching)
    put_database(tmp_path / "workspace")
    home = tmp_path / "workspace" / "prefect"
    runner = Serving(tmp_path, None, "mine", "ui", watching)
    try:
        runner.make(until="verify")
        runner.wish("train", "hang")
        runner.wait_until_said("stop         Ctrl-C")
        [api] = re.findall(r"PREFECT_API_URL=(\S+)", runner.said())
        assert f"Prefect UI   {api.removesuffix('/api')}\n" in runner.said()
        second = Serving(tmp_path, None, "mine", "ui")
        assert second.process.wait(timeout=60) == 2
        assert (
            second.said()
            == f"error: finetune serve (process {runner.process.pid}) serves the workspace {home.parent} already\n"
        )

        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            seen = Seen(client)
            run = seen.start("finetune-llama2/mine", run_name="through-it-all")
            runner.wait_until_hangs("train")
            shim = servers._running(home)
            assert shim is not None
            assert shim.pid is not None
            for pid in children(shim.pid):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: "the Prefect server died\nstarting a Prefect server in the workspace …\n" in runner.said(), 120)
            runner.wish("train", "")
            seen.wait_for(run.id, "Completed")
            assert runner.record("through-it-all").state == "done"
            wait_until(lambda: seen.unfinished(run.id) == [])

        os.killpg(runner.process.pid, signal.SIGINT)
        assert runner.process.wait(timeout=60) == 0
        wait_until(lambda: not servers._is_alive(home))
        assert not servers._answers(api)
        assert "Traceback" not in runner.said()
    finally:
        runner.end()

    lines = [line.split(maxsplit=2) for line in (watching / "connects.log").read_text().splitlines()]
    assert {program for _, _, program in lines if "prefect" in program or "fake" in program}, "nothing was watched"
    assert [line for line in lines if not HERE.fullmatch(line[1])] == []
