"""`finetune ui`: server and runner with one command, asleep and with a server that dies in the middle of a run; and nobody
outside is asked.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from processes import children, wait_until
from runners import ROOT, Seen, Serving

from flows.records.flock import is_locked
from flows.runner.deployments import deployments
from flows.server import local as servers
from flows.server.asking import answers

HERE = re.compile(r"(127\.0\.0\.1|localhost|::1|0\.0\.0\.0|None)(:\d+)?|unix:.*")


ASLEEP_SECONDS = 6.0  # longer than all looks of runner and server, and than the server keeps a connection open (5)


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """As all processes are while a laptop sleeps."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


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
            stage = runner.wait_until_hangs("train")
            shim = servers._running(home)
            assert shim is not None
            assert shim.pid is not None
            with stopped([runner.process.pid, *runner.flow_processes(), stage, shim.pid, *children(shim.pid)]):
                time.sleep(ASLEEP_SECONDS)  # what is tested is that time passes
            for pid in children(shim.pid):
                os.kill(pid, signal.SIGKILL)
            # The runner starts it again, or the run does, which may have no runner any more.
            wait_until(lambda: (running := servers._running(home)) is not None and running.pid != shim.pid, 120)
            runner.wish("train", "")
            seen.wait_for(run.id, "Completed")
            assert runner.record("through-it-all").state == "done"
            wait_until(lambda: seen.unfinished(run.id) == [])

            # The same deployments for a work pool; none of this asks anybody outside either.
            client.create_work_pool(WorkPoolCreate(name="finetune", type="process"))
            runner.environment["PREFECT_API_URL"] = api
            deployed = runner.cli("--no-prompt", "deploy", "--all", folder=ROOT)
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr
            for each in deployments([], None):
                found = client.read_deployment_by_name(each.full_name)
                assert (found.work_pool_name, found.parameters) == ("finetune", each.parameters)

        os.killpg(runner.process.pid, signal.SIGINT)
        assert runner.process.wait(timeout=60) == 0
        wait_until(lambda: not is_locked(home / "server.lock"))
        assert not answers(api)
        assert "Traceback" not in runner.said()
    finally:
        runner.end()

    lines = [line.split(maxsplit=2) for line in (watching / "connects.log").read_text().splitlines()]
    assert {program for _, _, program in lines if "prefect" in program or "fake" in program}, "nothing was watched"
    assert [line for line in lines if not HERE.fullmatch(line[1])] == []
