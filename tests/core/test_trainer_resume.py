"""Training that stops, for whatever reason, goes on with what it would have computed. Checkpoints: damaged, of other settings.

The oracle is a run that trains straight through; for other layouts, one process in float64.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import GlooPool
from tiny_job import assert_close, changed, make_job, stop_after, train_on_rank
from tiny_training import MODEL

from megatron_core_impl.checkpoint.relayout import relayout
from megatron_core_impl.checkpoint.training import STATE_FILE, finished_steps, step_folder
from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.metrics import Report
from megatron_core_impl.models.families import tensors
from megatron_core_impl.resume import newest_intact
from megatron_core_impl.train_config import Job
from megatron_core_impl.trainer import train


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32", "optimizer": "sgd"},
        {"precision": "bf16", "ramp_start": 4, "ramp_increment": 2, "ramp_samples": 20},
        {"precision": "fp16", "loss_scale_window": 2, "hidden_dropout": 0.2, "attention_dropout": 0.1},
    ],
)
def test_goes_on_exactly(job: Job, settings: dict[str, Any]) -> None:
    straight = changed(job, "straight", **settings)
    train(straight, Mesh.single())
    broken = changed(job, "broken", **settings)
    first = train(broken, Mesh.single(), should_stop=stop_after(3))
    assert (first.step, first.loss_after) == (3, None)
    assert finished_steps(broken.checkpoints) == [3]
    lines: list[str] = []
    second = train(broken, Mesh.single(), report=Report(log=lines.append))
    assert lines[0] == "going on from the checkpoint at step 3"
    assert second.loss_before == first.loss_before
    assert_close(broken, straight, 6, 0)


def test_goes_on_exactly_on_four_ranks(job: Job, pool: GlooPool) -> None:
    job = changed(job, "straight", precision="fp32")
    broken = changed(job, "broken")
    layout = Layout(tp=2, dp=2)
    pool.run(train_on_rank, 4, job, layout, None)
    assert [state.step for state in pool.run(train_on_rank, 4, broken, layout, 3)] == [3] * 4
    pool.run(train_on_rank, 4, broken, layout, None)
    assert_close(broken, job, 6, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(), Layout(tp=2, pp=2)),
        (Layout(tp=2, dp=2), Layout(pp=2, vpp=2)),
        (Layout(pp=4), Layout(tp=4)),
    ],
)
def test_goes_on_under_another_layout(tmp_path: Path, pool: GlooPool, before: Layout, after: Layout) -> None:
    """With tied embeddings, which lie on two pp ranks but once in a checkpoint, and key/value heads that tp 4 holds twice."""
    job = make_job(tmp_path, replace(MODEL, num_hidden_layers=4, tie_word_embeddings=True))
    train(job, Mesh.single())
    other = changed(job, "other", micro_batch_size=1)
    pool.run(train_on_rank, before.world_size, other, before, 3)
    pool.run(train_on_rank, after.world_size, other, after, None)
    assert_close(other, job, 6, 1e-9)


def test_goes_on_after_a_reshard(tmp_path: Path, pool: GlooPool) -> None:
    """Resharded, a checkpoint is cut as the training that goes on cuts its own."""
    job = make_job(tmp_path, replace(MODEL, num_hidden_layers=4, tie_word_embeddings=True))
    train(job, Mesh.single())
    other, layout = changed(job, "other", micro_batch_size=1), Layout(pp=2, dp=2)
    pool.run(train_on_rank, 4, other, Layout(tp=4), 3)
    resharded = replace(other, folder=tmp_path / "resharded")
    source = step_folder(other.checkpoints, 3)
    relayout(source, resharded.checkpoints, tensors(job.model), layout, progress=lambda done, total, text: None)
    shutil.copy(other.folder / "metrics.jsonl", resharded.folder)
    pool.run(train_on_rank, 4, resharded, layout, None)
    assert_close(resharded, job, 6, 1e-9)
    written = [json.loads((step_folder(resharded.checkpoints, step) / "index.json").read_bytes()) for step in (3, 6)]
    assert written[0]["layout"] == written[1]["layout"]
    assert sorted(written[0]["tensors"]) == sorted(written[1]["tensors"])
    for name, tensor in written[0]["tensors"].items():
        assert tensor == written[1]["tensors"][name], name


def test_goes_on_after_a_crash(job: Job) -> None:
    """What was written after the last checkpoint is written again, and stands once."""
    straight = changed(job, "straight", checkpoint_interval=2)
    train(straight, Mesh.single())
    crashed = changed(job, "crashed", checkpoint_interval=2)

    def crash(line: str) -> None:
        if line.startswith("step 5/6"):
            raise KeyError("the machine")

    with pytest.raises(KeyError):
        train(crashed, Mesh.single(), report=Report(log=crash))
    assert finished_steps(crashed.checkpoints) == [4, 2]
    (crashed.checkpoints / "step-000005.tmp").mkdir()
    with (crashed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(crashed, Mesh.single())
    assert sorted(path.name for path in crashed.checkpoints.iterdir()) == ["step-000004", "step-000006"]
    assert_close(crashed, straight, 6, 0)


def test_nothing_to_do_is_nothing_done(job: Job) -> None:
    first = train(job, Mesh.single())
    before = (job.folder / "metrics.jsonl").read_text()
    assert train(job, Mesh.single()) == first
    assert (job.folder / "metrics.jsonl").read_text() == before


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: flip_a_byte(folder / "rank-0000.safetensors"), "is not what was written: its digest differs"),
        (lambda folder: flip_a_byte(folder / "index.json"), "is not what was written: its digest differs"),
        (lambda folder: (folder / "rank-0000.safetensors").unlink(), "missing, and index.json needs it"),
        (lambda folder: (folder / "index.json").write_text("{}"), "has 2 bytes, state.json says"),
        (lambda folder: (folder / STATE_FILE).write_text('{"step": 4'), "is not readable"),
        (lambda folder: (folder / STATE_FILE).write_text('{"step": 2, "files": {}}'), "is not the state of step 4"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(job: Job, damage: Callable[[Path], None], text: str) -> None:
    straight = changed(job, "straight")
    train(straight, Mesh.single())
    job = changed(job, "damaged", checkpoint_interval=2)
    train(job, Mesh.single(), should_stop=stop_after(4))
    damage(step_folder(job.checkpoints, 4))
    warnings: list[str] = []
    train(job, Mesh.single(), report=Report(warn=warnings.append))
    assert len(warnings) == 1
    assert warnings[0].startswith("the checkpoint at step 4 is damaged and is not used: ")
    assert text in warnings[0]
    assert_close(job, straight, 6, 0)


def test_damage_is_told_once_by_several_ranks(job: Job, pool: GlooPool, capfd: pytest.CaptureFixture[str]) -> None:
    train(changed(job, checkpoint_interval=2), Mesh.single(), should_stop=stop_after(4))
    (step_folder(job.checkpoints, 4) / STATE_FILE).write_text("")
    flip_a_byte(step_folder(job.checkpoints, 2) / "rank-0000.safetensors")
    warnings = [line for told in pool.run(warnings_on_rank, 2, job) for line in told]
    assert [line[:24] for line in sorted(warnings)] == ["the checkpoint at step 2", "the checkpoint at step 4"]
    assert finished_steps(job.checkpoints) == []


def warnings_on_rank(job: Job) -> list[str]:
    warnings: list[str] = []
    assert newest_intact(job, init_mesh(Layout(dp=2), "cpu"), Report(warn=warnings.append)) is None
    return warnings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 2e-2}, "lr=0.01, now it is 0.02"),
        ({"seed": 1}, "seed=1234, now it is 1"),
        ({"steps": 7}, "steps=6, now it is 7"),
    ],
)
def test_other_settings_are_refused(job: Job, changes: dict[str, Any], text: str) -> None:
    train(job, Mesh.single(), should_stop=stop_after(1))
    with pytest.raises(ValueError, match="give the same again, or start anew") as error:
        train(changed(job, **changes), Mesh.single())
    assert text in str(error.value)


def test_other_data_is_refused(job: Job) -> None:
    train(job, Mesh.single(), should_stop=stop_after(1))
    (own,) = job.sets
    for other, text in ((replace(own, fingerprint="g"), r"\[\['all', 1.0, 'g'\]\]"), (replace(own, weight=2), r"2, 'f'\]\]")):
        with pytest.raises(ValueError, match=rf"datasets=\[\['all', 1.0, 'f'\]\], now it is .*{text}"):
            train(replace(job, sets=(other,)), Mesh.single())
