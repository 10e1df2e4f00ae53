"""The whole job with real stages and real processes: kill -9 in the middle of training, run again, change one setting."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_job import job_text, write_text
from workspaces import write_model

from flows.records.run_record import RunFolder, RunRecord
from megatron_core_impl.checkpoint.training import finished_steps
from megatron_core_impl.metrics import read_metrics
from stages.contracts.artifacts import CheckpointArtifact

ROOT = Path(__file__).parents[1]
STEPS = 60  # the first checkpoint is there after 10: the kill lands far from the end
BEFORE_TRAIN = {"download-model", "download-data", "preprocess", "convert", "verify", "shard"}
FROM_TRAIN = {"train", "merge", "export", "push"}


class Job:
    """A folder with a small model, some text and a configuration, and the `finetune` command in it, as a person uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        self.started: list[subprocess.Popen[str]] = []
        # Every process below us has this TMPDIR, whatever else its environment was cut to: that is how `processes` knows them.
        self.mark = f"TMPDIR={folder / 'tmp'}".encode()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir()
        (folder / "job.yaml").write_text(job_text(STEPS, 64, samples=8, batch=8, push="hub", rest="launch: {by: process}"))
        write_model(folder / "base", num_hidden_layers=2)
        write_text(folder / "text")

    def start(self, run: str, *arguments: str) -> subprocess.Popen[str]:
        """`finetune run` in a process group of its own. What it prints is in a file."""
        command = [sys.executable, "-m", "flows.cli", "run", "job.yaml", "--name", run, *arguments]
        with (self.folder / f"{run}.out").open("w") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, text=True, start_new_session=True, stdout=out, stderr=out
            )
        self.started.append(process)
        return process

    def run(self, run: str, *arguments: str) -> RunRecord:
        """`finetune run` to its end, which has to be a good one."""
        code = self.start(run, *arguments).wait(timeout=300)
        assert code == 0, (self.folder / f"{run}.out").read_text()
        return self.record(run)

    def record(self, run: str) -> RunRecord:
        record = RunFolder(self.workspace, run).read()
        assert record is not None
        return record

    def train_log(self, run: str) -> str:
        return RunFolder(self.workspace, run).log("train").read_text()

    def processes(self) -> list[int]:
        """All that live of what was started here: commands, stages, torchrun, workers, servers."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or is another person's
                if self.mark in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        return found

    def stop_server(self) -> None:
        """End the server that `--keep-server` left, as the command said."""
        told = re.search(r"to stop it: kill (\d+)", "".join(file.read_text() for file in self.folder.glob("*.out")))
        assert told is not None
        os.kill(int(told[1]), signal.SIGTERM)


def until(true: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"took too long: {what}"
        time.sleep(0.02)


def states(record: RunRecord, state: str) -> set[str]:
    return {name for name, node in record.nodes.items() if node.state == state}


@pytest.fixture
def job(tmp_path: Path, put_database: Callable[[Path], None]) -> Iterator[Job]:
    job = Job(tmp_path)
    put_database(job.workspace)
    yield job
    while left := job.processes():  # those of a test that failed
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in job.started:
            process.poll()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.timeout(900)  # a minute on two quiet cores
def test_kill_9_in_training_then_run_again_then_change_one_setting(job: Job) -> None:
    # Run, and kill the whole process group in the middle of training: nothing is left alive.
    first = job.start("first")
    checkpoints = "train/.*.partial/checkpoints/step-??????"

    def is_in_training() -> bool:
        assert first.poll() is None, (job.folder / "first.out").read_text()
        return any(job.workspace.glob(checkpoints))

    until(is_in_training, "the first checkpoint")
    alive = job.processes()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert len(alive) >= 6  # the command, the server, and of training: the stage, torchrun, two workers
    until(lambda: not job.processes(), "the end of stage, workers and server")
    killed = job.record("first")
    assert (killed.state, states(killed, "ran")) == ("crashed", BEFORE_TRAIN)
    (partial,) = (job.workspace / "train").glob(".*.partial")
    (saved, *_) = finished_steps(partial / "checkpoints")
    assert 10 <= saved < STEPS
    metrics_then = [line for line in read_metrics(partial) if line["step"] <= saved]

    # Run again: only training and what follows, and training from its last checkpoint.
    second = job.run("second", "--keep-server")  # the runs after it share its server, to save time
    assert (states(second, "cached"), states(second, "ran")) == (BEFORE_TRAIN, FROM_TRAIN)
    assert f"going on from the checkpoint at step {saved}\n" in job.train_log("second")
    train = job.workspace / "runs" / "second" / "train"
    metrics = read_metrics(train)
    assert metrics[: len(metrics_then)] == metrics_then  # with their times: they were kept, not made again
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics if "valid_loss" in line] == [0, 30, 60]
    assert len(list((train / "tensorboard").glob("events.out.tfevents.*"))) == 2  # one of each process that trained
    resumed = CheckpointArtifact.model_validate_json((train / "artifact.json").read_bytes())
    assert (resumed.step, resumed.tp) == (STEPS, 2)
    assert resumed.loss_after < resumed.loss_before - 2
    exported = job.workspace / "runs" / "second" / "export" / "model"
    assert held_out_loss(job, exported) < held_out_loss(job, job.folder / "base") - 2
    published = job.folder / "hub" / "model.safetensors"
    assert published.read_bytes() == (exported / "model.safetensors").read_bytes()

    # And again: nothing is left to do.
    third = job.run("third")
    assert states(third, "cached") == BEFORE_TRAIN | FROM_TRAIN

    # Another learning rate: everything up to shard is reused.
    fourth = job.run("fourth", "--set", "train.lr=2.0e-3")
    assert (states(fourth, "cached"), states(fourth, "ran")) == (BEFORE_TRAIN, FROM_TRAIN)
    assert "going on from" not in job.train_log("fourth")
    assert fourth.nodes["export"].path != second.nodes["export"].path
    assert published.read_bytes() != (exported / "model.safetensors").read_bytes()

    # The kill left no trace in the numbers: training without one makes the same weights, moments and figures, bit for bit.
    straight = train_without_a_kill(job)
    assert straight.fingerprint == resumed.fingerprint

    job.stop_server()
    until(lambda: not job.processes(), "the end of the server")


def held_out_loss(job: Job, folder: Path) -> float:
    """What `transformers` says of a model and its tokenizer on a text that was not trained on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode((job.folder / "text" / "39.py").read_text())[:128]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def train_without_a_kill(job: Job) -> CheckpointArtifact:
    """The stage alone, with the second run's spec, in a workspace that has its inputs and no result of it."""
    other = job.folder / "other"
    for stage in ("preprocess", "shard"):
        shutil.copytree(job.workspace / stage, other / stage)
    spec = json.loads(RunFolder(job.workspace, "second").spec("train").read_bytes())
    (other / "train.json").write_text(json.dumps(spec | {"workspace": str(other)}))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", str(other / "train.json")],
        env=job.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on from" not in done.stdout + done.stderr
    (result,) = (other / "train").glob("*/artifact.json")
    return CheckpointArtifact.model_validate_json(result.read_bytes())
