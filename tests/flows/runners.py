"""A runner as a process, with stand-in stages, and what one sees of its runs: in Prefect, on disk, among the processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from fake_stages import make_results
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort
from processes import lives, wait_until

from flows.asked.load_config import load_config
from flows.records.run_record import RunFolder, RunRecord

ROOT = Path(__file__).parents[2]
CONFIG = "model: {source: somebody/model}\ndata: {source: somebody/data}\ntrain: {steps: 2, sequence_length: 16}\n"
CONFIG += "launch: {by: process, gpus: none}\n"  # whatever the machine has


class Place:
    """A folder with a workspace, NAME.yaml, and the `finetune` command, whose stages are stand-ins."""

    def __init__(self, folder: Path, name: str, api: str | None, python_path: Path | None = None) -> None:
        self.folder, self.workspace, self.name = folder, folder / "workspace", name
        (folder / f"{name}.yaml").write_text(CONFIG)
        (self.workspace / "fake").mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "HF_TOKEN": "a-secret-token"}
        self.environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [python_path, ROOT])))
        self.environment.pop("PREFECT_API_URL", None)
        if api is not None:
            self.environment["PREFECT_API_URL"] = api

    def finetune(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """The command, in a process group of its own."""
        command = [sys.executable, str(Path(__file__).with_name("fake_finetune.py")), *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, start_new_session=True, **options)

    def wish(self, node: str, what: str) -> None:
        """What the stand-in of a node shall do."""
        (self.workspace / "fake" / node).write_text(what)

    def make(self, until: str) -> None:
        """The results of the nodes up to one."""
        make_results(load_config(self.folder / f"{self.name}.yaml", [f"workspace={self.workspace}"]), until=until)

    def record(self, run: str) -> RunRecord:
        record = RunFolder(self.workspace, run).read()
        assert record is not None
        return record

    def wait_until_hangs(self, node: str) -> int:
        """The process of a node's stage, once it hangs."""
        file = self.workspace / f"{node}.hangs"
        wait_until(lambda: file.exists() and file.read_text() != "")
        return int(file.read_text())


class Serving(Place):
    """`finetune serve NAME.yaml` in a folder, against a server; deployed as finetune-llama2/NAME."""

    def __init__(
        self, folder: Path, api: str | None, name: str, command: str = "serve", python_path: Path | None = None
    ) -> None:
        super().__init__(folder, name, api, python_path)
        self.output = folder / f"{command}-{len(list(folder.glob('*.log')))}.log"
        with self.output.open("wb") as output:
            self.process = self.finetune(command, f"{name}.yaml", stdout=output, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.output.read_text()

    def wait_until_said(self, text: str, seconds: float = 120) -> None:
        wait_until(lambda: text in self.said() or self.process.poll() is not None, seconds)
        assert text in self.said()

    def end(self) -> None:
        """Whatever is left."""
        for pid in [self.process.pid, *self.flow_processes()]:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def flow_processes(self) -> list[int]:
        """Those of the runs: they have the runs' locks."""
        records = [RunFolder(self.workspace, folder.name).read() for folder in (self.workspace / "runs").glob("*")]
        return [record.pid for record in records if record is not None and record.state == "running"]

    def cli(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Prefect's own command, in the runner's folder or another."""
        command = [sys.executable, "-P", "-m", "prefect", *arguments]
        return subprocess.run(
            command, cwd=folder or self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )


class Seen:
    """Prefect's API."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client

    def start(self, deployment: str, **parameters: Any) -> FlowRun:
        found = self.client.read_deployment_by_name(deployment)
        return self.client.create_flow_run_from_deployment(found.id, parameters=parameters)

    def state(self, flow_run_id: UUID) -> str:
        return self.client.read_flow_run(flow_run_id).state_name or ""

    def message(self, flow_run_id: UUID) -> str:
        state = self.client.read_flow_run(flow_run_id).state
        return (state.message if state is not None else None) or ""

    def wait_for(self, flow_run_id: UUID, *states: str) -> None:
        wait_until(lambda: self.state(flow_run_id) in states, 90)

    def pages(self, flow_run_id: UUID) -> dict[str, str]:
        """What a run shows, by key; of two pages under one key the newer."""
        asked = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        found = self.client.read_artifacts(artifact_filter=asked, sort=ArtifactSort.CREATED_DESC)
        return {str(page.key): str(page.data) for page in reversed(found)}

    def tasks(self, flow_run_id: UUID) -> dict[str, list[str]]:
        """Names of the task runs' states, one after the other for each attempt."""
        asked = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        runs = sorted(self.client.read_task_runs(flow_run_filter=asked), key=lambda run: run.created)
        found: dict[str, list[str]] = {}
        for run in runs:
            found.setdefault(run.name, []).append(run.state_name or "")
        return found

    def unfinished(self, flow_run_id: UUID) -> list[str]:
        asked = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        runs = self.client.read_task_runs(flow_run_filter=asked)
        return [f"{run.name} {run.state_name}" for run in runs if run.state is None or not run.state.is_final()]
