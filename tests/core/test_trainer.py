"""Training: what it computes under any layout, when it stops, and what it does when something is wrong.

The oracles are a plain loop over PyTorch's own optimizer, and for layouts one process in float64.
"""

import json
import math
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conversation_files import write_random
from distributed import GlooPool
from tiny_job import assert_close, changed, losses_of, make_job, stop_after, tensors_of, train_on_rank
from tiny_training import MODEL

from megatron_core_impl import trainer
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.training import STATE_FILE, finished_steps, step_folder
from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.metrics import Report, Sums, read_metrics
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.resume import begin
from megatron_core_impl.train_config import DataSet, Job, Rates, TrainConfig
from megatron_core_impl.train_step import StepResult
from megatron_core_impl.trainer import TrainingDiverged, train
from megatron_core_impl.training_data import open_data


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


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
    assert metrics[1]["lr"] == pytest.approx(job.config.rates(3 * 8).lr)
    assert list((job.folder / "tensorboard").iterdir())
    assert not {"loss_scale", "batch_size"} & metrics[1].keys(), "they do not vary"

    assert [line for line in lines if line.startswith("step  4/30 · loss ")]
    assert lines[-1].startswith("step 30/30 · held-out loss ")
    assert "tokens/s · 0s left" in texts[-1]
    assert texts[-1].startswith("step 30/30 · loss ")


PLAIN = [(8, 1e-2 * k / 2 if k <= 2 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (k - 2) / 4)) / 2, 0.1) for k in range(1, 7)]
GROWING = [  # samples, learning rate (linear down from the 8th sample to the 32nd), weight decay
    (4, 5e-3, 0.1 * 4 / 32),
    (4, 1e-2, 0.1 * 8 / 32),
    (4, 0.0, 0.0),  # the step that is skipped
    (6, 1e-3 + 9e-3 * 14 / 24, 0.1 * 18 / 32),
    (6, 1e-3 + 9e-3 * 8 / 24, 0.1 * 24 / 32),
    (8, 1e-3, 0.1),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PLAIN),
        (
            {
                "ramp_start": 4, "ramp_increment": 2, "ramp_samples": 20, "schedule": "linear", "weight_decay_start": 0.0,
                "weight_decay_style": "linear", "skip_steps": (3,),
            },
            GROWING,
        ),
    ],
)  # fmt: skip
def test_equals_a_plain_loop(job: Job, settings: dict[str, Any], expected: list[tuple[int, float, float]]) -> None:
    """The oracle: PyTorch's own AdamW and clipping on whole batches; their sizes and rates by their definition."""
    job = changed(job, **settings)
    lines: list[str] = []
    train(job, Mesh.single(), report=Report(log=lines.append))
    data = open_data(job).train
    model = parallelize(MODEL, Mesh.single(), dtype=torch.float64)
    load_weights(model, open_weights(job.weights))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
    written, first = [], 0
    for step, (size, lr, weight_decay) in enumerate(expected, start=1):
        tokens, labels = (
            torch.stack([torch.from_numpy(data[k][column]) for k in range(first, first + size)]) for column in (0, 1)
        )
        first += size
        loss = model.loss(tokens, labels, torch.full((size, 16), 1 / (16 * size), dtype=torch.float64))
        written.append((step, "loss", loss.item()))
        if step in job.config.skip_steps:
            continue
        optimizer.zero_grad()
        loss.backward()
        written.append((step, "grad_norm", torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        optimizer.step()
    ours = [line for line in losses_of(job) if line[1] != "valid_loss" and line[2] is not None]
    assert [line[:2] for line in ours] == [line[:2] for line in written]
    assert [line[2] for line in ours] == pytest.approx([line[2] for line in written], rel=1e-9)
    saved = tensors_of(job, 6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach()[: len(saved[name])], rtol=0, atol=1e-9, msg=name)
    if settings:
        told = [line for line in lines if " · loss " in line]
        assert [line.split(" · ")[4] for line in told] == [f"batch {size}" for size, _, _ in expected]
        assert " · no update, as skip_steps asks · " in told[2]
        trained = [line for line in read_metrics(job.folder) if "loss" in line]
        assert [line["batch_size"] for line in trained] == [size for size, _, _ in expected]


def test_held_out_loss_is_the_mean_over_tokens(job: Job) -> None:
    """By hand: every sample of the evaluation alone. In one of its batches more tokens count than in the other."""
    data = open_data(changed(job, eval_batches=2)).valid
    samples = [torch.from_numpy(np.append(data[k].tokens, data[k].labels[-1])) for k in range(2 * 8)]
    ids, counts = torch.stack(samples[:8])[:, :-1].unique(return_counts=True)
    job = replace(changed(job, eval_batches=2, eod_mask_loss=True), eod_id=int(ids[counts.argmax()]))
    is_counted = torch.stack(samples)[:, :-1] != job.eod_id
    assert is_counted[:8].sum() != is_counted[8:].sum()
    model = begin(job, Mesh.single(), Report())[0]
    with torch.no_grad():
        logits = torch.cat([model(sample[None, :-1])[:, : MODEL.vocab_size] for sample in samples])
    losses = torch.nn.functional.cross_entropy(logits, torch.cat([sample[1:] for sample in samples]), reduction="none")
    expected = losses[is_counted.reshape(-1)].mean()
    found = trainer.evaluate(Pipeline(model), open_data(job).valid, job)
    assert found.mean_loss == pytest.approx(expected.item(), rel=1e-12)
    assert found.tokens == is_counted.sum()


def test_the_test_split_is_read_once_at_the_end(job: Job) -> None:
    job = changed(job, split="60,20,20", steps=3, eval_interval=1)
    lines: list[str] = []
    state = train(job, Mesh.single(), report=Report(log=lines.append))
    told = [line for line in read_metrics(job.folder) if "test_loss" in line]
    assert [(line["step"], line["test_loss"]) for line in told] == [(3, state.loss_test)]
    assert state.loss_test not in (None, state.loss_after)
    model = begin(job, Mesh.single(), Report())[0]  # of the last checkpoint
    data = open_data(job).test
    assert data is not None
    assert trainer.evaluate(Pipeline(model), data, job).mean_loss == pytest.approx(state.loss_test, rel=1e-12)
    assert lines[0].startswith("evaluation: 8 samples (of ")
    assert lines[-1].startswith("step 3/3 · test loss ")


PLAN = "before the first step, every {} and after the last: about {} of the training's time"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_batches": 1}, "8 samples (of 20), " + PLAN.format(2, "22.2%")),  # 4 × 8 rows, and 48 of training
        ({"eval_batches": 99}, "20 samples (all there are), " + PLAN.format(2, "55.6%")),  # 4 × 20
        ({"eval_batches": None}, "1 sample (of 20), " + PLAN.format("6 (every 2 would cost over 5%)", "2.8%")),  # 2 × 2
        (
            {"eval_batches": None, "steps": 60, "eval_interval": 20},
            "8 samples (of 20), " + PLAN.format(20, "2.2%"),  # 4 × 8 of 480
        ),
    ],
)  # fmt: skip
def test_what_evaluations_cost_is_told(job: Job, settings: dict[str, Any], told: str) -> None:
    lines: list[str] = []
    job = changed(job, **settings)
    train(job, Mesh.single(), report=Report(log=lines.append), should_stop=stop_after(1))
    assert lines[0] == f"evaluation: {told}"


def test_evaluations_keep_to_what_is_told(job: Job) -> None:
    train(changed(job, eval_batches=None, eval_interval=1, steps=20), Mesh.single())
    told = [line["step"] for line in read_metrics(job.folder) if "valid_loss" in line]
    every = told[1]
    assert every > 1
    assert told == [*range(0, 20, every), 20]


@pytest.mark.parametrize("packing", [True, False])
def test_small_weights_are_as_good_as_large_ones(job: Job, packing: bool) -> None:
    """A weight that all labels have changes nothing: not what is learnt, and not what is told."""
    prefix = write_random(job.folder.parent / "set", [4 + n % 9 for n in range(40)], MODEL.vocab_size)
    job = replace(job, sets=(DataSet(prefix=prefix, fingerprint="f"),), content="conversations")
    runs = [changed(job, f"run-{weight}", assistant_weight=weight, packing=packing) for weight in (1.0, 1e-3)]
    states = [train(run, Mesh.single()) for run in runs]
    assert_close(runs[1], runs[0], 6, 1e-9)
    data = open_data(runs[0]).train
    labels = [data[k].weights for k in range(48)]
    expected = sum(int((weights > 0).sum()) for weights in labels if weights is not None)
    assert [state.consumed_tokens for state in states] == [expected] * 2
    assert sum(line["tokens"] for line in read_metrics(runs[1].folder) if "loss" in line) == expected


def test_held_out_samples_without_anything_that_counts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *arguments: Sums())
    with pytest.raises(ValueError, match="no token of the held-out samples counts in the loss: give other data for them"):
        train(job, Mesh.single())


def test_cut_of_the_batch_does_not_matter(job: Job) -> None:
    train(job, Mesh.single())
    for micro_batch_size in (1, 8):
        other = changed(job, f"micro-{micro_batch_size}", micro_batch_size=micro_batch_size)
        train(other, Mesh.single())
        assert_close(other, job, 6, 1e-9)


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2), Layout(pp=2, vpp=2, dp=2)])
def test_layout_does_not_matter(tmp_path: Path, pool: GlooPool, layout: Layout) -> None:
    """With tied embeddings, documents that end, and a batch that grows."""
    job = make_job(tmp_path, replace(MODEL, num_hidden_layers=4, tie_word_embeddings=True))
    job = changed(
        job, micro_batch_size=1, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True,
        ramp_start=4, ramp_increment=4, ramp_samples=16,
    )  # fmt: skip
    train(job, Mesh.single())
    other = changed(job, "other")
    states = pool.run(train_on_rank, layout.world_size, other, layout)
    assert_close(other, job, 6, 1e-9)
    assert all(state == states[0] for state in states)
    assert states[0].consumed_tokens < 6 * 8 * 16 - 16, "some tokens do not count"


def test_full_recompute_changes_nothing(job: Job) -> None:
    job = changed(job, precision="fp32", hidden_dropout=0.1, attention_dropout=0.1)
    train(job, Mesh.single())
    other = changed(job, "other", recompute="full", recompute_layers_per_unit=2)
    train(other, Mesh.single())
    assert_close(other, job, 6, 0)


def test_dropout_is_for_training_only(job: Job) -> None:
    """It changes the first step, and not the held-out loss before it."""
    other = changed(job, "other", hidden_dropout=0.5)
    train(job, Mesh.single(), should_stop=stop_after(1))
    train(other, Mesh.single(), should_stop=stop_after(1))
    (_, _, before), (_, _, loss), *_ = losses_of(job)
    (_, _, before_too), (_, _, other_loss), *_ = losses_of(other)
    assert before == before_too
    assert abs(loss - other_loss) > 1e-3


def test_fp16_finds_a_loss_scale(job: Job) -> None:
    """Too large a scale at first: steps are skipped until it has fallen far enough, and then it trains as fp32 does."""
    lines: list[str] = []
    settings: dict[str, Any] = {"steps": 20, "warmup_steps": 0, "eval_interval": 20}
    fp32, fp16 = changed(job, "fp32", precision="fp32", **settings), changed(job, "fp16", precision="fp16", **settings)
    fp16 = changed(fp16, "fp16", initial_loss_scale=2.0**24, loss_scale_hysteresis=1, loss_scale_window=4)
    state = train(fp16, Mesh.single(), report=Report(log=lines.append))
    scales = [line["loss_scale"] for line in read_metrics(fp16.folder) if "loss" in line]
    skipped = [line["skipped_steps"] for line in read_metrics(fp16.folder) if "loss" in line]
    assert scales[0] == 2.0**24
    assert sum(skipped) == state.skipped_steps > 0
    for now, then, is_skipped in zip(scales, scales[1:], skipped[:-1], strict=False):
        assert then == now / 2 if is_skipped else then in (now, 2 * now)
    assert max(scales[8:]) < 2.0**24
    assert " · loss scale 1.67772e+07 · " in next(line for line in lines if line.startswith("step  1/20 · loss"))
    assert state.loss_before is not None
    assert state.loss_after is not None
    assert state.loss_after < 0.8 * state.loss_before

    static = changed(job, "static", precision="fp16", loss_scale=2.0**12, **settings)
    train(static, Mesh.single(), should_stop=stop_after(1))
    train(fp32, Mesh.single(), should_stop=stop_after(1))
    (_, _, loss), (_, _, norm) = losses_of(static)[1:3]
    assert loss == pytest.approx(losses_of(fp32)[1][2], rel=2e-3), "what is told is not scaled"
    assert norm == pytest.approx(losses_of(fp32)[2][2], rel=2e-2)


# Stopping


def test_stops_when_its_time_is_up(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = count()
    clock = SimpleNamespace(monotonic=lambda: 60 * next(minutes), perf_counter=time.perf_counter)
    monkeypatch.setattr(trainer, "time", clock)
    lines: list[str] = []
    state = train(changed(job, stop_after_minutes=4), Mesh.single(), report=Report(log=lines.append))
    assert (state.step, state.loss_after) == (4, None)
    assert lines[-1] == "stop_after_minutes=4 have passed"
    assert finished_steps(job.checkpoints) == [4]


def test_a_step_without_finite_gradient_is_skipped(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    job = changed(job, steps=3, warmup_steps=0)
    train(job, Mesh.single(), should_stop=stop_after(1))
    spoil(monkeypatch, steps={2})
    state = train(job, Mesh.single(), report=Report(log=lines.append), should_stop=stop_after(1))
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (2, 1, 1)
    assert "1 of 1 steps skipped" in lines[1]
    line = next(line for line in read_metrics(job.folder) if line["step"] == 2 and "loss" in line)
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (None, None, 1)
    record = json.loads((step_folder(job.checkpoints, 2) / STATE_FILE).read_text())
    assert (record["skipped_steps"], record["optimizer_steps"], record["consumed_samples"]) == (1, 1, 16)
    for name, values in tensors_of(job, 2).items():
        assert torch.equal(values, tensors_of(job, 1)[name]), name
    assert train(job, Mesh.single()).skipped_in_a_row == 0


def test_many_such_steps_stop_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job = changed(job, steps=20, checkpoint_interval=2, max_skipped_steps=3)
    spoil(monkeypatch, steps={1, 2, *range(4, 21)})
    with pytest.raises(TrainingDiverged) as error:
        train(job, Mesh.single())
    assert "not finite in 3 steps in a row, the last at step 6" in str(error.value)
    assert "Lower lr (now 0.01)" in str(error.value)
    last = finished_steps(job.checkpoints)[0]
    assert f"The last checkpoint is step {last}" in str(error.value)
    assert all(torch.isfinite(values).all() for values in tensors_of(job, last).values())


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps infinite."""
    real, rates = trainer.train_step, TrainConfig.rates
    is_spoilt = False

    def note(config: TrainConfig, consumed_samples: int) -> Rates:
        nonlocal is_spoilt
        is_spoilt = consumed_samples // config.global_batch_size + 1 in steps
        return rates(config, consumed_samples)

    def train_step(pipeline: Pipeline, *rest: Any, **more: Any) -> StepResult:
        with monkeypatch.context() as patch:
            if is_spoilt:
                forward = pipeline.model.forward_chunk
                patch.setattr(pipeline.model, "forward_chunk", lambda *batch: forward(*batch) * math.inf)
            return real(pipeline, *rest, **more)

    monkeypatch.setattr(TrainConfig, "rates", note)
    monkeypatch.setattr(trainer, "train_step", train_step)


def test_damaged_weights_stop_before_the_first_step(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *arguments: Sums(math.nan, 1.0, 1))
    with pytest.raises(TrainingDiverged, match="held-out loss is nan before the first step: the weights to start from"):
        train(job, Mesh.single())


def test_bf16_keeps_every_digit_of_the_weights(job: Job) -> None:
    job = changed(job, precision="bf16", lr=1e-30, min_lr=0.0, weight_decay=0.0, steps=1, warmup_steps=0)
    train(job, Mesh.single())
    start, end = open_weights(job.weights), tensors_of(job, 1)
    for name in start.names:
        assert end[name].dtype == torch.float32
        assert torch.equal(end[name], start.read(name)), name


def peak_on_rank() -> int:
    mesh = init_mesh(Layout(dp=2), "cpu")
    with patch.object(trainer, "peak_bytes", lambda: 100 + mesh.rank):
        return trainer._peak_memory(mesh)


def test_memory_is_that_of_the_process_which_needs_most(pool: GlooPool) -> None:
    assert pool.run(peak_on_rank, 2) == [101, 101]
