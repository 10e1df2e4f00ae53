"""The whole job in containers, as a person runs it: killed in training, stopped, done in the end, and with the same bits as
without containers and accidents."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from scripted import containers_of
from whole_job import job_text, write_text
from workspaces import write_model

from flows.asked.load_config import load_config
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, StageJob
from flows.records.run_record import RunFolder
from flows.server.local import Server
from megatron_core_impl.checkpoint.training import finished_steps
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.process import ExitCode
from stages.contracts.specs import SOURCES, SPECS

ROOT = Path(__file__).parents[2]
STEPS = 120  # the first checkpoint is there after 10: what happens then lands far from the end
CONFIG = job_text(
    STEPS, 32, samples=2, batch=4, push="hub/mine", train="eval_batches: 1",
    rest='export: {prompts: ["def "], max_new_tokens: 4}\nlaunch: {by: docker, gpus: none}',
)  # fmt: skip


class Job:
    """A folder with a small model, some text and a configuration, and the `finetune` command in it."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        write_model(folder / "base", num_hidden_layers=2)
        write_text(folder / "text")
        (folder / "job.yaml").write_text(CONFIG)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
            "PYTHONPATH": str(ROOT), "PREFECT_API_URL": server.api, "PREFECT_HOME": str(folder / "prefect"),
        }  # fmt: skip

    def start(self, run: str) -> subprocess.Popen[str]:
        """`finetune run` in a process group of its own. What it prints is in a file."""
        command = [sys.executable, "-m", "flows.cli", "run", "job.yaml", "--name", run]
        with self.printed(run).open("w") as out:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, text=True, start_new_session=True, stdout=out, stderr=out
            )

    def printed(self, run: str) -> Path:
        return self.folder / f"{run}.out"

    def log(self, run: str) -> str:
        file = RunFolder(self.workspace, run).log("train")
        return file.read_text() if file.exists() else ""

    @property
    def saved(self) -> int:
        """The newest checkpoint of a training that is not finished."""
        folders = list((self.workspace / "train").glob(".*.partial/checkpoints"))
        return max((step for folder in folders for step in finished_steps(folder)), default=0)

    def wait_for_a_checkpoint(self, process: subprocess.Popen[str], run: str, after: int = 0) -> int:
        def is_there() -> bool:
            assert process.poll() is None, self.printed(run).read_text()
            return self.saved > after

        wait_until(is_there, seconds=600)
        return self.saved


@pytest.mark.timeout(1800)  # a minute on two quiet cores
def test_killed_stopped_and_done_with_the_same_artifacts(
    client: Any, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, server)

    # kill -9 of everything in the middle of training: it saves its work and ends, though nobody is left to ask for it.
    killed = job.start("killed")
    saved = job.wait_for_a_checkpoint(killed, "killed")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: all(container.status == "exited" for container in containers_of(client, job.workspace)))
    (left,) = containers_of(client, job.workspace)
    assert left.attrs["State"]["ExitCode"] == ExitCode.INTERRUPTED
    assert saved <= job.saved < STEPS

    # SIGTERM, as Prefect cancels: the run waits for the checkpoint, and leaves nothing. What the first one left is gone, too.
    stopped = job.start("stopped")
    saved = job.wait_for_a_checkpoint(stopped, "stopped", after=job.saved)
    stopped.terminate()
    assert stopped.wait(timeout=300) == 143
    assert containers_of(client, job.workspace) == []
    assert saved <= job.saved < STEPS
    assert "going on from the checkpoint at step" in job.log("stopped")
    saved = job.saved

    done = job.start("done")
    assert done.wait(timeout=600) == 0, job.printed("done").read_text()
    assert f"going on from the checkpoint at step {saved}\n" in job.log("done")
    assert (tmp_path / "hub" / "mine" / "model.safetensors").is_file()
    assert containers_of(client, job.workspace) == []

    record = RunFolder(job.workspace, "done").read()
    assert record is not None
    boxed = {node: a.load_artifact(job.workspace / str(state.path)) for node, state in record.nodes.items()}
    (image,) = {artifact.versions.image for artifact in boxed.values()}
    assert image is not None
    assert "sha256:" in image

    monkeypatch.chdir(tmp_path)
    bare = as_processes(load_config(Path("job.yaml")).model_copy(update={"workspace": "bare"}))
    assert {artifact.versions.image for artifact in bare.values()} == {None}
    assert {node: artifact.fingerprint for node, artifact in boxed.items()} == {
        node: artifact.fingerprint for node, artifact in bare.items()
    }


def as_processes(config: PipelineConfig) -> dict[str, a.Artifact]:
    """Every stage, one after the other, as plain processes."""
    made: dict[str, a.Artifact] = {}
    folder = config.workspace_path / "by-hand"
    folder.mkdir(parents=True)
    for node, kind in SPECS.items():
        spec = kind.of(config, **{name: made[source] for name, source in SOURCES[node].items()})
        job = StageJob(node, spec.STAGE, folder / f"{node}.json", folder / f"{node}.log", "by-hand")  # nothing is on the Hub
        job.spec_file.write_text(spec.model_dump_json())
        ProcessLauncher().run(job, Caller(lambda line: None, lambda progress: None, threading.Event()))
        made[node] = a.load_artifact(spec.folder)
    return made
