"""A tiny training job, how to run it on ranks, and how to compare what two of them computed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import MODEL, write_dataset, write_weights

from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.training import step_folder
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.mesh import init_mesh
from megatron_core_impl.metrics import read_metrics
from megatron_core_impl.resume import State
from megatron_core_impl.train_config import DataSet, Job, TrainConfig
from megatron_core_impl.trainer import train

CONFIG = TrainConfig(
    steps=6, sequence_length=16, micro_batch_size=2, global_batch_size=8, lr=1e-2, min_lr=1e-3, warmup_steps=2,
    split="80,20,0", eval_interval=2, eval_batches=1, checkpoint_interval=100, log_interval=1, precision="fp64",
)  # fmt: skip


def make_job(folder: Path, model: ModelConfig = MODEL, config: TrainConfig = CONFIG) -> Job:
    """A job whose inputs lie in a folder, and whose results go to its subfolder `run`."""
    write_weights(folder / "weights", model=model)
    write_dataset(folder / "dataset")
    return Job(
        config=config, model=model, weights=folder / "weights",
        sets=(DataSet(prefix=folder / "dataset" / "data", fingerprint="f"),), folder=folder / "run", eod_id=2,
    )  # fmt: skip


def changed(job: Job, folder: str = "run", **settings: Any) -> Job:
    """The job with other settings, in another folder beside its own."""
    return replace(job, config=replace(job.config, **settings), folder=job.folder.parent / folder)


def stop_after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that lets so many steps through."""
    asked = iter(range(1000))
    return lambda: next(asked) == steps


def train_on_rank(job: Job, layout: Layout, steps: int | None = None) -> State:
    """For the pool: this rank's part of a training, to the end or for so many steps."""
    mesh = init_mesh(layout, "cpu", kv_replicas=layout.kv_replicas(job.model))
    return train(job, mesh, should_stop=stop_after(steps) if steps else lambda: False)


def tensors_of(job: Job, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    reader = open_weights(step_folder(job.checkpoints, step))
    return {name: reader.read(name) for name in reader.names}


def losses_of(job: Job) -> list[tuple[int, str, float]]:
    """Every loss, norm and loss scale that a job wrote down."""
    kinds = ("loss", "grad_norm", "valid_loss", "loss_scale")
    return [(line["step"], kind, line[kind]) for line in read_metrics(job.folder) for kind in kinds if kind in line]


def assert_close(ours: Job, theirs: Job, step: int, tolerance: float) -> None:
    """The same losses on the way, and the same checkpoint. With tolerance 0: bit for bit."""
    for (step_a, kind_a, a), (step_b, kind_b, b) in zip(losses_of(ours), losses_of(theirs), strict=True):
        assert (step_a, kind_a) == (step_b, kind_b)
        assert a == pytest.approx(b, rel=tolerance, abs=0), f"{kind_a} of step {step_a}"
    left, right = tensors_of(ours, step), tensors_of(theirs, step)
    assert left.keys() == right.keys()
    for name, values in left.items():
        if tolerance:
            torch.testing.assert_close(values, right[name], rtol=0, atol=tolerance, msg=name)
        else:
            assert torch.equal(values, right[name]), name
