"""Training over two containers on one engine, in a network of their own: what it computes, how it stops, and how it fails."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_stages import changed
from processes import wait_until
from scripted import IN_CONTAINERS, containers_of
from train_inputs import cut_spec

from flows.launch.docker import DockerLauncher
from flows.launch.docker_engine import default_host
from flows.launch.docker_request import LABEL
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, Launcher, Progress, StageFailed, StageJob
from megatron_core_impl.checkpoint.training import finished_steps
from stages.contracts import artifacts as a
from stages.contracts.specs import TrainSpec

pytestmark = pytest.mark.timeout(900)  # half a minute each on two quiet cores
STEPS = 120  # the first checkpoint is there after 10: the kill lands far from the end


class Training:
    """A training of two processes, one on each of two machines, or both on this one."""

    def __init__(self, workspace: Path, **settings: Any) -> None:
        self.spec = cut_spec(workspace, tp=2, **({"steps": STEPS} | settings))
        folder = workspace / "runs" / "brisk-otter"
        self.job = StageJob("train", "train", folder / "specs" / "train.json", folder / "logs" / "train.log", "brisk-otter")
        self.job.spec_file.parent.mkdir(parents=True)
        self.job.spec_file.write_text(self.spec.model_dump_json())
        self.lines: list[str] = []
        self.steps: list[float] = []
        self.on_step: Callable[[], object] = lambda: None
        self.stop = threading.Event()

    def on_nodes(self) -> DockerLauncher:
        """A launcher with two machines, which are the same one."""
        asked = changed(
            Path(self.spec.workspace), layout={"tp": 2}, train=self.spec.settings.model_dump(),
            launch=IN_CONTAINERS | {"hosts": [default_host()] * 2},
        )  # fmt: skip
        return DockerLauncher(asked, grace=60)

    def run(self, launcher: Launcher) -> a.CheckpointArtifact:
        def on_progress(progress: Progress) -> None:
            self.steps.append(progress.done)
            self.on_step()

        launcher.run(self.job, Caller(self.lines.append, on_progress, self.stop))
        artifact = a.load_artifact(self.spec.folder)
        assert isinstance(artifact, a.CheckpointArtifact)
        return artifact

    @property
    def saved(self) -> list[int]:
        """Steps with a checkpoint, of a training that is not finished; the newest first."""
        return finished_steps(self.spec.scratch / "checkpoints")


def second_of(client: Any, workspace: Path) -> Any:
    """The container of the second node."""
    (second,) = [c for c in containers_of(client, workspace) if c.attrs["Config"]["Hostname"] == "node-1"]
    return second


def in_one_process(spec: TrainSpec, elsewhere: Path) -> a.CheckpointArtifact:
    """The same training on this machine, without containers."""
    other = Training(elsewhere, **spec.settings.model_dump(include={"steps", "checkpoint_interval"}))
    assert other.spec.key == spec.key
    return other.run(ProcessLauncher(visible_gpus=""))  # as the containers


def test_two_nodes_one_dies_and_training_goes_on(client: Any, workspace: Path, tmp_path: Path) -> None:
    """A node is killed: all ends, the error names it, nothing is left. Run again, training goes on from its checkpoint, and has
    computed in the end what one machine computes without an accident."""
    training = Training(workspace, checkpoint_interval=10)

    def kill_the_second() -> None:
        wait_until(lambda: bool(training.saved), seconds=240)
        second_of(client, workspace).kill("SIGKILL")

    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill_the_second)
        with pytest.raises(StageFailed) as caught:
            training.run(training.on_nodes())
        killing.result()
    assert str(caught.value).startswith(f"train: node 1 ({default_host()}): killed (SIGKILL) from outside")
    assert caught.value.reason == "killed"
    assert containers_of(client, workspace) == []
    assert client.networks.list(filters={"label": f"{LABEL}workspace={workspace}"}) == []
    (saved, *_) = training.saved

    made = training.run(training.on_nodes())
    assert f"[node 0] going on from the checkpoint at step {saved}" in training.lines
    assert (made.step, made.tp) == (STEPS, 2)
    assert made.versions.image is not None
    assert made.fingerprint == in_one_process(training.spec, tmp_path / "elsewhere").fingerprint
    assert training.job.log_file.read_text().count("[node 0] 2 processes") == 2  # both attempts, in one place


def test_stopping_two_nodes(client: Any, workspace: Path) -> None:
    training = Training(workspace, steps=100_000)
    training.on_step = lambda: training.steps[-1] and training.stop.set()
    with pytest.raises(StageFailed, match=r"stopped; saved at step \d+; run again to go on") as caught:
        training.run(training.on_nodes())
    assert caught.value.reason == "interrupted"
    assert len(training.saved) == 1
    assert containers_of(client, workspace) == []


def test_a_worker_that_dies_on_the_second_node(client: Any, workspace: Path) -> None:
    """Its container goes on for a while; the first node's notices sooner. The error names the second all the same."""
    training = Training(workspace, steps=100_000)
    done: list[bool] = []

    def kill_its_worker() -> None:
        if not done:
            done.append(True)
            assert second_of(client, workspace).exec_run(["python", "-c", KILL]).exit_code == 0

    training.on_step = kill_its_worker
    with pytest.raises(StageFailed) as caught:
        training.run(training.on_nodes())
    assert str(caught.value).startswith(f"train: node 1 ({default_host()}): rank 1 was killed by the kernel (out of memory?)")
    assert containers_of(client, workspace) == []


# In a container: kill the process that has RANK set.
KILL = """
import os, pathlib, signal
for file in pathlib.Path("/proc").glob("[0-9]*/environ"):
    if b"\\0RANK=" in b"\\0" + file.read_bytes():
        os.kill(int(file.parent.name), signal.SIGKILL)
"""
