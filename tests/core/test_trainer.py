"""Training: what it computes under any layout, how it goes on after a stop, and what it does when something is wrong.

The oracle for layouts and for going on is one process in float64 that trains straight through.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import GlooPool
from tiny_training import MODEL, write_dataset, write_weights

from megatron_core_impl import trainer
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.training import STATE_FILE, finished_steps, step_folder
from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.metrics import Report, read_metrics
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parallel.zero import ZeroOptimizer
from megatron_core_impl.trainer import Job, State, TrainConfig, TrainingDiverged, train

CONFIG = TrainConfig(
    steps=6, sequence_length=16, micro_batch_size=2, global_batch_size=8, lr=1e-2, min_lr=1e-3, warmup_steps=2,
    split="80,20,0", eval_interval=2, eval_batches=1, checkpoint_interval=100, log_interval=1, precision="fp64",
)  # fmt: skip
Line = Callable[[str], None]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_weights(tmp_path / "weights")
    write_dataset(tmp_path / "dataset")
    return Job(
        config=CONFIG, model=MODEL, weights=tmp_path / "weights", dataset=tmp_path / "dataset" / "data",
        dataset_fingerprint="f", folder=tmp_path / "run",
    )  # fmt: skip


def changed(job: Job, folder: str = "run", **settings: Any) -> Job:
    return replace(job, config=replace(job.config, **settings), folder=job.folder.parent / folder)


def stop_after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that lets so many steps through."""
    asked = iter(range(1000))
    return lambda: next(asked) == steps


def tensors_of(job: Job, step: int) -> dict[str, torch.Tensor]:
    reader = open_weights(step_folder(job.checkpoints, step))
    return {name: reader.read(name) for name in reader.names}


def losses_of(job: Job) -> list[tuple[int, str, float]]:
    kinds = ("loss", "grad_norm", "valid_loss")
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


def train_on_rank(job: Job, layout: Layout, steps: int | None) -> State:
    """For the pool: this rank's part of a training, to the end or for so many steps."""
    return train(job, init_mesh(layout, "cpu"), should_stop=stop_after(steps) if steps else lambda: False)


def test_learns(job: Job) -> None:
    job = changed(job, steps=30, checkpoint_interval=10, log_interval=4, eval_interval=10)
    lines: list[str] = []
    texts: list[str] = []
    state = train(job, Mesh.single(), report=Report(lines.append, lines.append, lambda done, total, text: texts.append(text)))
    assert state.loss_before is not None
    assert state.loss_after is not None
    assert state.loss_after < 0.6 * state.loss_before
    assert (state.step, state.consumed_samples, state.consumed_tokens) == (30, 240, 240 * 16)
    assert finished_steps(job.checkpoints) == [30, 20], "the two newest are kept"

    metrics = read_metrics(job.folder)
    assert [line["step"] for line in metrics if "loss" in line] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["step"] for line in metrics if "valid_loss" in line] == [0, 10, 20, 30]
    assert metrics[-1]["valid_perplexity"] == pytest.approx(math.exp(state.loss_after))
    assert metrics[1]["lr"] == pytest.approx(job.config.learning_rate(4))
    assert list((job.folder / "tensorboard").iterdir())

    assert [line for line in lines if line.startswith("step  4/30 · loss ")]
    assert lines[-1].startswith("step 30/30 · held-out loss ")
    assert "tokens/s · 0s left" in texts[-1]
    assert texts[-1].startswith("step 30/30 · loss ")


def test_equals_a_plain_loop(job: Job) -> None:
    """The oracle: PyTorch's own AdamW and clipping on whole batches, the samples and the learning rates by their definition."""
    train(job, Mesh.single())
    data, _ = trainer._datasets(job)
    model = parallelize(MODEL, Mesh.single(), dtype=torch.float64)
    load_weights(model, open_weights(job.weights))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    expected = []
    for step in range(1, 7):
        samples = torch.stack([torch.from_numpy(data[k]) for k in range(8 * (step - 1), 8 * step)])
        loss = model.loss(samples[:, :-1], samples[:, 1:], torch.full((8, 16), 1 / 128, dtype=torch.float64))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 1e-2 * step / 2 if step <= 2 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        expected += [(step, "loss", loss.item()), (step, "grad_norm", norm.item())]
    ours = [line for line in losses_of(job) if line[1] != "valid_loss"]
    assert [line[:2] for line in ours] == [line[:2] for line in expected]
    assert [line[2] for line in ours] == pytest.approx([line[2] for line in expected], rel=1e-9)
    saved = tensors_of(job, 6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach()[: len(saved[name])], rtol=0, atol=1e-9, msg=name)


def test_held_out_loss_is_the_mean_over_tokens(job: Job) -> None:
    """By hand: every sample of the evaluation alone."""
    job = changed(job, eval_batches=2)
    _, data = trainer._datasets(job)
    model, _, _ = trainer._begin(job, Mesh.single(), Report())
    samples = [torch.from_numpy(data[k]) for k in range(2 * 8)]
    with torch.no_grad():
        logits = torch.cat([model(sample[None, :-1])[:, : MODEL.vocab_size] for sample in samples])
    expected = torch.nn.functional.cross_entropy(logits, torch.cat([sample[1:] for sample in samples]))
    assert trainer.evaluate(model, data, job.config, Mesh.single()) == pytest.approx(expected.item(), rel=1e-12)


def test_cut_of_the_batch_does_not_matter(job: Job) -> None:
    train(job, Mesh.single())
    for micro_batch_size in (1, 8):
        other = changed(job, f"micro-{micro_batch_size}", micro_batch_size=micro_batch_size)
        train(other, Mesh.single())
        assert_close(other, job, 6, 1e-9)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_layout_does_not_matter(job: Job, pool: GlooPool, tp: int, dp: int) -> None:
    train(job, Mesh.single())
    other = changed(job, "other")
    states = pool.run(train_on_rank, tp * dp, other, Layout(tp=tp, dp=dp), None)
    assert_close(other, job, 6, 1e-9)
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_goes_on_exactly(job: Job, precision: str) -> None:
    straight = changed(job, "straight", precision=precision)
    train(straight, Mesh.single())
    broken = changed(job, "broken", precision=precision)
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


@pytest.mark.parametrize(("before", "after"), [(Layout(), Layout(tp=2, dp=2)), (Layout(tp=2, dp=2), Layout(dp=2))])
def test_goes_on_under_another_layout(job: Job, pool: GlooPool, before: Layout, after: Layout) -> None:
    train(job, Mesh.single())
    other = changed(job, "other", micro_batch_size=1)
    pool.run(train_on_rank, before.world_size, other, before, 3)
    pool.run(train_on_rank, after.world_size, other, after, None)
    assert_close(other, job, 6, 1e-9)


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
        (lambda folder: flip_a_byte(folder / "rank-0000.safetensors"), "is not what was written: its SHA-256 differs"),
        (lambda folder: flip_a_byte(folder / "index.json"), "is not what was written: its SHA-256 differs"),
        (lambda folder: (folder / "rank-0000.safetensors").unlink(), "is missing"),
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
    assert trainer._newest_intact(job, init_mesh(Layout(dp=2), "cpu"), Report(warn=warnings.append)) is None
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
    with pytest.raises(ValueError, match="dataset='f', now it is 'g'"):
        train(replace(job, dataset_fingerprint="g"), Mesh.single())


def test_a_step_without_finite_gradient_is_skipped(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    train(changed(job, "one", steps=2), Mesh.single(), should_stop=stop_after(1))
    spoil(monkeypatch, steps={2})
    state = train(changed(job, "one", steps=2), Mesh.single(), report=Report(log=lines.append))
    assert state.skipped_steps == 1
    assert state.step == 2
    assert "1 of 1 steps skipped" in lines[1]
    line = next(line for line in read_metrics(job.folder.parent / "one") if line["step"] == 2 and "loss" in line)
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (None, None, 1)
    record = json.loads((step_folder(changed(job, "one").checkpoints, 2) / STATE_FILE).read_text())
    assert (record["skipped_steps"], record["optimizer_steps"], record["consumed_samples"]) == (1, 1, 16)
    whole = changed(job, "one")
    for name, values in tensors_of(whole, 2).items():
        assert torch.equal(values, tensors_of(whole, 1)[name]), name


def test_many_such_steps_stop_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job = changed(job, steps=20, checkpoint_interval=2)
    spoil(monkeypatch, steps=set(range(4, 21)))
    with pytest.raises(TrainingDiverged) as error:
        train(job, Mesh.single())
    assert "not finite in 10 steps in a row, the last at step 13" in str(error.value)
    assert "Lower lr (now 0.01)" in str(error.value)
    last = finished_steps(job.checkpoints)[0]
    assert f"The last checkpoint is step {last}" in str(error.value)
    assert all(torch.isfinite(values).all() for values in tensors_of(job, last).values())


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps infinite."""
    real, skipped = trainer.train_step, []

    def train_step(model: Transformer, optimizer: ZeroOptimizer, *rest: Any, lr: float) -> tuple[float, int, float]:
        with monkeypatch.context() as patch:
            if optimizer.step_count + len(skipped) + 1 in steps:
                skipped.append(1)
                loss = model.loss
                patch.setattr(model, "loss", lambda *batch: loss(*batch) * math.inf)
            return real(model, optimizer, *rest, lr=lr)

    monkeypatch.setattr(trainer, "train_step", train_step)


def test_damaged_weights_stop_before_the_first_step(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *arguments: math.nan)
    with pytest.raises(TrainingDiverged, match="held-out loss is nan before the first step: the weights to start from"):
        train(job, Mesh.single())


def test_bf16_keeps_every_digit_of_the_weights(job: Job) -> None:
    job = changed(job, precision="bf16", lr=1e-30, min_lr=0.0, weight_decay=0.0, steps=1, warmup_steps=0)
    train(job, Mesh.single())
    start, end = open_weights(job.weights), tensors_of(job, 1)
    for name in start.names:
        assert end[name].dtype == torch.float32
        assert torch.equal(end[name], start.read(name)), name


def test_a_batch_without_targets_changes_nothing_but_the_decay(job: Job) -> None:
    model, optimizer, _ = trainer._begin(changed(job, weight_decay=0.0), Mesh.single(), Report())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = trainer.Batch(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16))
    assert trainer.train_step(model, optimizer, [batch], Mesh.single(), lr=0.1) == (0.0, 0, 0.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
