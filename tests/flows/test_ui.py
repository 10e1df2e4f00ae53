"""`finetune ui`: server and runner with one command, asleep and with a server that dies in the middle of a run; and nobody
outside is asked.
"""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asked_whom import Watch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from processes import asleep, children, wait_until
from runners import ROOT, Seen, Serving

from flows.records.flock import is_locked
from flows.runner.deployments import deployments
from flows.server import local as servers
from flows.server.asking import answers

ASLEEP_SECONDS = 6.0  # longer than all looks of runner and server, and than the server keeps a connection open (5)


def test_server_and_runner(tmp_path: Path, put_database: Callable[[Path], None]) -> None:
    watch = Watch(tmp_path)
    put_database(tmp_path / "workspace")
    home = tmp_path / "workspace" / "prefect"
    runner = Serving(tmp_path, None, "mine", "ui", watch.folder)
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
            asleep([runner.process.pid, *runner.flow_processes(), stage, shim.pid, *children(shim.pid)], ASLEEP_SECONDS)
            for pid in children(shim.pid):
                os.kill(pid, signal.SIGKILL)
            # The runner starts it again, or the run does, which may have no runner any more.
            wait_until(lambda: (running := servers._running(home)) is not None and running.pid != shim.pid, 120)
            runner.wish("train", "")
            seen.wait_for(run.id, "Completed")
            assert runner.record("through-it-all").state == "done"
            wait_until(lambda: seen.unfinished(run.id) == [])

            # The same deployments for a work pool, whose worker tells as the runner does what is wrong with a run; none of this
            # asks anybody outside either.
            client.create_work_pool(WorkPoolCreate(name="finetune", type="process"))
            runner.environment["PREFECT_API_URL"] = api
            deployed = runner.cli("--no-prompt", "deploy", "--all", folder=ROOT)
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr
            for each in deployments([], None):
                found = client.read_deployment_by_name(each.full_name)
                assert found.work_pool_name == "finetune"
                assert but_for_the_place(found.parameters) == but_for_the_place(each.parameters)
            wrong = seen.start("finetune-llama2/demo", overrides=["model.source=/nowhere", f"workspace={home.parent}"])
            worked = runner.cli("worker", "start", "--pool", "finetune", "--run-once", folder=ROOT)
            assert worked.returncode == 0, worked.stdout + worked.stderr
            seen.wait_for(wrong.id, "Failed")
            assert "config: model.source: /nowhere: no such file" in seen.message(wrong.id)

        os.killpg(runner.process.pid, signal.SIGINT)
        assert runner.process.wait(timeout=60) == 0
        wait_until(lambda: not is_locked(home / "server.lock"))
        assert not answers(api)
        assert "Traceback" not in runner.said()
    finally:
        runner.end()

    assert [program for program in watch.programs() if "prefect server start" in program], "the server was not watched"
    assert [program for program in watch.programs() if "fake_stages.py" in program], "stages were not watched"
    assert watch.outside() == []


def but_for_the_place(parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a deployment: where the workspace is follows from the folder that a worker is told to go to, and a runner stays in."""
    config = {key: value for key, value in parameters.get("config", {}).items() if key != "workspace"}
    return {**{key: value for key, value in parameters.items() if key != "workspace"}, "config": config}
