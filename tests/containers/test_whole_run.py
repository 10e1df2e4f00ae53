"""The whole job in containers, as a person runs it: killed in training, stopped, done in the end, and with the same bits as
without containers and accidents."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from scripted import containers_of
from whole_job import Job, job_text

from flows.asked.load_config import load_config
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, StageJob
from flows.records.flock import is_locked
from flows.server.local import Server
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.process import ExitCode
from stages.contracts.specs import SOURCES, SPECS

STEPS = 120  # the first checkpoint is there after 10: what happens then lands far from the end
CONFIG = job_text(
    STEPS, 32, samples=2, batch=4, push="hub/mine", train="eval_batches: 1",
    rest='export: {prompts: ["def "], max_new_tokens: 4}\nlaunch: {by: docker, gpus: none}',
)  # fmt: skip


@pytest.mark.timeout(1800)  # a minute on two quiet cores
def test_killed_stopped_and_done_with_the_same_artifacts(
    client: Any, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, CONFIG, PREFECT_API_URL=server.api, PREFECT_HOME=str(tmp_path / "prefect"))
    turn = job.workspace / ".training"

    # kill -9 of everything in the middle of training: it saves its work and ends, though nobody is left to ask for it. Its
    # GPUs are nobody else's before that has ended.
    killed = job.start("killed")
    saved = job.wait_for_a_checkpoint(killed, "killed")
    (container,) = containers_of(client, job.workspace)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert is_locked(turn)
    assert job.record("killed").state == "crashed"
    assert container.wait(timeout=300)["StatusCode"] == ExitCode.INTERRUPTED
    assert saved <= job.saved < STEPS
    wait_until(lambda: containers_of(client, job.workspace) == [])
    wait_until(lambda: not is_locked(turn))

    # SIGTERM, as Prefect cancels: the run waits for the checkpoint, and leaves nothing.
    stopped = job.start("stopped")
    saved = job.wait_for_a_checkpoint(stopped, "stopped", after=job.saved)
    stopped.terminate()
    assert stopped.wait(timeout=300) == 143
    assert containers_of(client, job.workspace) == []
    assert saved <= job.saved < STEPS
    assert "going on from the checkpoint at step" in job.train_log("stopped")
    saved = job.saved

    record = job.run("done")
    assert f"going on from the checkpoint at step {saved}\n" in job.train_log("done")
    assert (tmp_path / "hub" / "mine" / "model.safetensors").is_file()
    assert containers_of(client, job.workspace) == []

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
