"""The settings of a run: what does not go together, and the rates and batches that follow."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_job import CONFIG, make_job
from tiny_training import MODEL

from megatron_core_impl.loss_scale import DynamicLossScale, StaticLossScale
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Report
from megatron_core_impl.resume import begin
from megatron_core_impl.train_config import DataSet, Job, Rates, TrainConfig
from megatron_core_impl.trainer import train


def config(**settings: Any) -> TrainConfig:
    needed: dict[str, Any] = {"steps": 10, "sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1.0}
    return TrainConfig(**(needed | settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"schedule": "Cosine"},
            "schedule='Cosine' is not supported. Legal here: cosine, linear, constant, inverse-square-root",
        ),
        ({"weight_decay_style": "foo"}, "weight_decay_style='foo' is not supported. Legal here: constant, linear, cosine"),
        ({"optimizer": "lamb"}, "optimizer='lamb' is not supported. Legal here: adamw, sgd"),
        ({"recompute": "half"}, "recompute='half' is not supported. Legal here: none, selective, full"),
        ({"attention_kernel": "xla"}, "attention_kernel='xla' is not supported. Legal here: auto, flash-attn, varlen, sdpa"),
        ({"lr": math.nan}, "lr=nan must be a finite number"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"min_lr": -1e-4}, "min_lr=-0.0001 must be at least 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"eval_interval": 0}, "eval_interval=0 must be at least 1"),
        ({"log_interval": 0}, "log_interval=0 must be at least 1"),
        ({"decay_steps": 0}, "decay_steps=0 must be at least 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"decay_steps": True}, "decay_steps=True must be a whole number"),
        ({"precision": "fp16", "initial_loss_scale": math.inf}, "initial_loss_scale=inf must be a finite number"),
        ({"stop_after_minutes": -1.0}, "stop_after_minutes=-1.0 must be above 0"),
        ({"warmup_steps": 10}, "warmup_steps=10 must be less than the 10 steps of the schedule"),
        ({"warmup_steps": 5, "decay_steps": 5}, "warmup_steps=5 must be less than the 5 steps"),
        ({"min_lr": 2.0}, "min_lr=2.0 must not exceed lr=1.0: lower min_lr too, or raise lr"),
        ({"weight_decay_style": "linear"}, "weight_decay_start=None does not go with weight_decay_style=linear"),
        ({"weight_decay_start": 0.0}, "weight_decay_start=0.0 does not go with weight_decay_style=constant: a start needs"),
        (
            {"weight_decay_style": "cosine", "weight_decay_start": 0.5},
            "weight_decay_start=0.5 must not exceed weight_decay=0.1",
        ),
        ({"loss_scale": 8.0}, "loss_scale=8.0 is for precision fp16; fp32 needs none. Leave it out"),
        (
            {"ramp_start": 2},
            "a batch that grows needs all of ramp_start, ramp_increment, ramp_samples; missing: ramp_increment",
        ),
        ({"ramp_increment": 2, "ramp_samples": 9}, "missing: ramp_start"),
        ({"ramp_start": 4, "ramp_increment": 3, "ramp_samples": 9}, "increment divides 4"),
        ({"skip_steps": (3, 11)}, "skip_steps has 11, but steps are counted from 1 to 10"),
        ({"lima_dropout": True}, "lima_dropout=True needs hidden_dropout above 0"),
        ({"recompute_layers_per_unit": 2}, "layers_per_unit=2 is of recompute mode full; here it is none"),
        ({"precision": "fp16", "min_loss_scale": 2.0**20}, "must be at least min_loss_scale"),
        (
            {"assistant_weight": 0.0},
            "system_weight, user_weight and assistant_weight are all 0, so nothing would be learnt from a",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        config(**settings)


def rates(config: TrainConfig) -> list[Rates]:
    consumed, found = 0, []
    for _ in range(config.steps):
        found.append(config.rates(consumed))
        consumed += config.batches.size_at(consumed)
    assert consumed == config.samples
    return found


def test_rates() -> None:
    """No step is spent at 0, and the last one is at the end of the schedule."""
    linear = config(steps=5, warmup_steps=2, schedule="linear")
    assert [rate.lr for rate in rates(linear)] == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3, 0.0])
    assert {rate.weight_decay for rate in rates(linear)} == {0.1}
    reference = replace(linear, reference_first_lr=True)
    assert [rate.lr for rate in rates(reference)] == pytest.approx([0.0, 0.5, 1.0, 2 / 3, 1 / 3])
    short = replace(linear, decay_steps=4, min_lr=0.25)
    assert [rate.lr for rate in rates(short)] == pytest.approx([0.5, 1.0, 0.625, 0.25, 0.25])
    root = replace(linear, schedule="inverse-square-root")
    assert [rate.lr for rate in rates(root)] == pytest.approx([0.5, *(math.sqrt(2 / n) for n in (2, 3, 4, 5))])
    growing = replace(linear, weight_decay_start=0.0, weight_decay_style="linear")
    assert [rate.weight_decay for rate in rates(growing)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates(replace(growing, reference_first_lr=True))[0].weight_decay == 0.0


def test_rates_follow_samples_where_batches_grow() -> None:
    growing = config(steps=5, warmup_steps=2, schedule="linear", ramp_start=2, ramp_increment=6, ramp_samples=3)
    assert growing.samples == 2 + 2 + 3 * 8
    assert [rate.lr for rate in rates(growing)] == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3, 0.0])


def test_loss_scale() -> None:
    assert config(precision="bf16").new_loss_scale() == StaticLossScale(1.0)
    assert config(precision="fp16", loss_scale=64.0).new_loss_scale() == StaticLossScale(64.0)
    dynamic = config(precision="fp16", initial_loss_scale=4.0, loss_scale_window=7, loss_scale_hysteresis=3)
    assert dynamic.new_loss_scale() == DynamicLossScale(initial=4.0, minimum=1.0, window=7, hysteresis=3)


def job(**settings: Any) -> Job:
    here = Path()
    sets = (DataSet(prefix=here, fingerprint="f"),)
    return Job(config=replace(CONFIG, **settings), model=MODEL, weights=here, sets=sets, folder=here)


def test_what_must_agree() -> None:
    """How the work is cut does not count, unless the loss is defined by it."""
    assert job(micro_batch_size=1, recompute="full", compile=True, skip_steps=(5,)).must_agree() == job().must_agree()
    assert job(overlap=False, attention_kernel="sdpa").must_agree() == job().must_agree()
    assert job(hidden_dropout=0.1).must_agree() != job().must_agree()
    assert job(reference_loss_mean=True, micro_batch_size=1).must_agree() != job(reference_loss_mean=True).must_agree()


def test_switches() -> None:
    on, off = config().optimizer_settings, config(overlap=False).optimizer_settings
    assert (on.overlap_reduce, on.overlap_gather, off.overlap_reduce, off.overlap_gather) == (True, True, False, False)
    assert (config().kernel, config(attention_kernel="varlen").kernel) == (None, "varlen")


def test_batches_that_a_layout_cannot_share_out_are_refused_before_anything_is_read() -> None:
    """Here as in the stage, whose tests know all the texts."""
    with pytest.raises(
        ValueError, match=r"^train\.global_batch_size=8 is not a multiple of .* = 3 × 1 = 3\. Nearest legal: 6 or 9$"
    ):
        begin(job(micro_batch_size=3), Mesh.single("meta"), Report())


def test_a_kernel_that_cannot_compute_here_is_refused_before_training(tmp_path: Path) -> None:
    tiny = make_job(tmp_path, config=replace(CONFIG, attention_kernel="flash-attn"))
    told = r"^attention_kernel='flash-attn' computes on CUDA in bf16 or fp16, not on cpu in torch\.float64"
    with pytest.raises(ValueError, match=told):
        train(tiny, Mesh.single())
    assert list(tiny.checkpoints.iterdir()) == []


def test_documents_need_an_end() -> None:
    with pytest.raises(ValueError, match="need the id of the token that ends a document, and eod_id is None"):
        job(reset_attention_mask=True)
