"""The whole job with real stages and real processes: kill -9 in the middle of training, and run again; and none of them asks
anybody outside.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from asked_whom import Watch
from processes import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_job import ROOT, Job, job_text

from flows.records.run_record import RunFolder, RunRecord
from megatron_core_impl.metrics import read_metrics
from stages.contracts.artifacts import CheckpointArtifact
from stages.contracts.specs import SPECS

RUN = "calm-heron"
STEPS = 60  # the first checkpoint is there after 10: the kill lands far from the end
BEFORE_TRAIN = {"download-model", "download-data", "preprocess", "convert", "verify", "shard"}
FROM_TRAIN = {"train", "merge", "export", "push"}


def processes(job: Job) -> list[int]:
    """All that live of what was started here: commands, stages, torchrun, workers, servers.

    They have a TMPDIR of the job, whatever else their environment was cut to.
    """
    mark, found = f"TMPDIR={job.environment['TMPDIR']}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or is another person's
            if mark in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def states(record: RunRecord, state: str) -> set[str]:
    return {name for name, node in record.nodes.items() if node.state == state}


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


@pytest.fixture
def job(tmp_path: Path, watch: Watch, put_database: Callable[[Path], None]) -> Iterator[Job]:
    (tmp_path / "tmp").mkdir()
    config = job_text(STEPS, 64, samples=8, batch=8, push="hub", rest="launch: {by: process}")
    job = Job(tmp_path, config, TMPDIR=str(tmp_path / "tmp"), PYTHONPATH=os.pathsep.join([str(watch.folder), str(ROOT)]))
    put_database(job.workspace)
    yield job
    while left := processes(job):  # those of a test that failed
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in job.started:
            process.poll()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.timeout(900)  # a minute on two quiet cores
def test_kill_9_in_training_then_run_again(job: Job, watch: Watch) -> None:
    # Run, and kill the whole process group in the middle of training: nothing is left alive.
    killed = job.start(RUN)
    job.wait_for_a_checkpoint(killed, RUN)
    alive = processes(job)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(alive) >= 6  # the command, the server, and of training: the stage, torchrun, two workers
    wait_until(lambda: not processes(job), 300)
    crashed = job.record(RUN)
    assert (crashed.state, states(crashed, "ran")) == ("crashed", BEFORE_TRAIN)
    saved = job.saved
    assert 10 <= saved < STEPS
    (partial,) = (job.workspace / "train").glob(".*.partial")
    metrics_then = [line for line in read_metrics(partial) if line["step"] <= saved]

    # Run it again: only training and what follows, and training from its last checkpoint.
    again = job.run(RUN, "--keep-server", again=True)
    assert (states(again, "cached"), states(again, "ran")) == (BEFORE_TRAIN, FROM_TRAIN)
    assert f"going on from the checkpoint at step {saved}\n" in job.train_log(RUN)
    train = job.workspace / "runs" / RUN / "train"
    metrics = read_metrics(train)
    assert metrics[: len(metrics_then)] == metrics_then  # with their times: they were kept, not made again
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics if "valid_loss" in line] == [0, 30, 60]
    assert len(list((train / "tensorboard").glob("events.out.tfevents.*"))) == 2  # one of each process that trained
    resumed = CheckpointArtifact.model_validate_json((train / "artifact.json").read_bytes())
    assert (resumed.step, resumed.tp) == (STEPS, 2)
    assert resumed.loss_after < resumed.loss_before - 2
    exported = job.workspace / "runs" / RUN / "export" / "model"
    assert held_out_loss(job, exported) < held_out_loss(job, job.folder / "base") - 2
    published = job.folder / "hub" / "model.safetensors"
    assert published.read_bytes() == (exported / "model.safetensors").read_bytes()

    # Its server stays, until it is ended as the command said.
    told = re.search(r"to stop it: kill (\d+)\n", job.printed(RUN).read_text())
    assert told is not None
    assert int(told[1]) in processes(job)
    os.kill(int(told[1]), signal.SIGTERM)
    wait_until(lambda: not processes(job), 300)

    # The kill left no trace in the numbers: training without one makes the same weights, moments and figures, bit for bit.
    straight = train_without_a_kill(job)
    assert straight.fingerprint == resumed.fingerprint

    # Nobody outside was asked by any of them.
    modules = {f"stages.{spec.STAGE}" for spec in SPECS.values()} | {"stages.torchrun"}
    assert modules <= set(re.findall(r"-m (stages\.\w+)", "\n".join(watch.programs())))
    assert watch.outside() == []


def held_out_loss(job: Job, folder: Path) -> float:
    """What `transformers` says of a model and its tokenizer on a text that was not trained on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode((job.folder / "text" / "39.py").read_text())[:128]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def train_without_a_kill(job: Job) -> CheckpointArtifact:
    """The stage alone, with the run's spec, in a workspace that has its inputs and no result of it."""
    other = job.folder / "other"
    for stage in ("preprocess", "shard"):
        shutil.copytree(job.workspace / stage, other / stage)
    spec = json.loads(RunFolder(job.workspace, RUN).spec("train").read_bytes())
    (other / "train.json").write_text(json.dumps(spec | {"workspace": str(other)}))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", str(other / "train.json")],
        env=job.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on from" not in done.stdout + done.stderr
    (result,) = (other / "train").glob("*/artifact.json")
    return CheckpointArtifact.model_validate_json(result.read_bytes())
