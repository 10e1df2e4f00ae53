"""The whole job in containers, as a person runs it: killed in training, stopped, cancelled, done in the end, and with the same
bits as without containers and accidents. Prefect tells how it went, and nothing tells the token."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from processes import wait_until
from scripted import containers_of
from traces import home_of, in_command_lines, in_files, told_by
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

TOKEN = "hf_atokenofnobodyatall"
STEPS = 160  # the first checkpoint is there after 10: what happens then lands far from the end
CONFIG = job_text(
    STEPS, 32, samples=2, batch=4, push="hub/mine", train="eval_batches: 1",
    rest='export: {prompts: ["def "], max_new_tokens: 4}\nlaunch: {by: docker, gpus: none}',
)  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, server: Server) -> Iterator[Job]:
    job = Job(tmp_path, CONFIG, PREFECT_API_URL=server.api, PREFECT_HOME=str(tmp_path / "prefect"), HF_TOKEN=TOKEN)
    yield job
    for process in job.started:  # of a test that failed
        process.kill()
        process.wait()


@pytest.mark.timeout(1800)  # a minute on two quiet cores
def test_killed_stopped_cancelled_and_done_with_the_same_artifacts(
    client: Any, job: Job, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = job.workspace / ".training"

    # kill -9 of everything in the middle of training: it saves its work and ends, though nobody is left to ask for it. Its
    # GPUs are nobody else's before that has ended.
    killed = job.start("killed")
    saved = job.wait_for_a_checkpoint(killed, "killed")
    (container,) = containers_of(client, job.workspace)
    assert TOKEN not in json.dumps([container.attrs, container.top()])
    assert in_command_lines(TOKEN) == []
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert is_locked(turn)
    assert job.record("killed").state == "crashed"
    assert container.wait(timeout=300)["StatusCode"] == ExitCode.INTERRUPTED
    assert saved <= job.saved < STEPS
    wait_until(lambda: containers_of(client, job.workspace) == [])
    wait_until(lambda: not is_locked(turn))

    # SIGTERM, and cancelled in Prefect: the run waits for the checkpoint, and leaves nothing.
    for name, stop in (("stopped", subprocess.Popen.terminate), ("cancelled", lambda _: cancel(job, "cancelled", server))):
        process = job.start(name)
        went_on_from = job.saved
        saved = job.wait_for_a_checkpoint(process, name, after=went_on_from)
        stop(process)
        assert process.wait(timeout=300) == 143
        assert containers_of(client, job.workspace) == []
        assert saved <= job.saved < STEPS
        assert f"going on from the checkpoint at step {went_on_from}\n" in job.train_log(name)
    assert job.record("cancelled").error == "cancelled in Prefect"
    saved = job.saved

    record = job.run("done")
    assert f"going on from the checkpoint at step {saved}\n" in job.train_log("done")
    assert (tmp_path / "hub" / "mine" / "model.safetensors").is_file()
    assert containers_of(client, job.workspace) == []

    told = told_by(server.api)
    logs, pages = ([row for row in told[kind] if row["flow_run_id"] == record.flow_run_id] for kind in ("logs", "artifacts"))
    assert any(re.search(rf"\bstep {STEPS}/{STEPS} · loss ", row["message"]) for row in logs)
    assert [row["data"] for row in pages if row["key"] == "train-progress"] == [100]
    assert [kind for kind, rows in told.items() if TOKEN in str(rows) or not rows] == []
    assert in_files(TOKEN, tmp_path, home_of(server.api)) == []  # the workspace, and what was printed

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


def cancel(job: Job, run: str, server: Server) -> None:
    """As the web UI does."""
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(job.record(run).flow_run_id), Cancelling())


def as_processes(config: PipelineConfig) -> dict[str, a.Artifact]:
    """Every stage, one after the other, as plain processes."""
    made: dict[str, a.Artifact] = {}
    folder = config.workspace_path / "by-hand"
    folder.mkdir(parents=True)
    for node, kind in SPECS.items():
        spec = kind.of(config, **{name: made[source] for name, source in SOURCES[node].items()})
        job = StageJob(node, spec.STAGE, folder / f"{node}.json", folder / f"{node}.log", "by-hand")  # nothing is on the Hub
        job.spec_file.write_text(spec.model_dump_json())
        ProcessLauncher(visible_gpus="").run(job, Caller(lambda line: None, lambda progress: None, threading.Event()))
        made[node] = a.load_artifact(spec.folder)
    return made
