"""Learning rate, weight decay and batch size as functions of progress: the reference's numbers (golden facts G6 and G7)."""

import subprocess
import sys
from typing import Any

import pytest

from megatron_core_impl.optim import BatchSchedule, OptimizerSettings, lr_at, weight_decay_at

G6: dict[str, Any] = {"lr": 3e-4, "min_lr": 1e-6, "warmup_steps": 50, "decay_steps": 500}
G7 = BatchSchedule(global_batch_size=64, start=16, increment=8, ramp_samples=300)


@pytest.mark.parametrize(
    ("schedule", "n", "expected"),
    [
        ("cosine", 0, 0.0),
        ("cosine", 1, 6e-6),
        ("cosine", 25, 1.5e-4),
        ("cosine", 50, 3e-4),
        ("cosine", 51, 2.9999635679045647e-4),
        ("cosine", 275, 1.505e-4),
        ("cosine", 499, 1.0036432095434853e-6),
        ("cosine", 500, 1e-6),
        ("cosine", 501, 1e-6),
        ("linear", 51, 2.993355555555556e-4),
        ("linear", 275, 1.505e-4),
        ("linear", 499, 1.664444444444444e-6),
        ("constant", 25, 1.5e-4),
        ("constant", 275, 3e-4),
        ("constant", 501, 3e-4),
        ("inverse-square-root", 25, 1.5e-4),
        ("inverse-square-root", 50, 3e-4),
        ("inverse-square-root", 51, 3e-4 * (50 / 51) ** 0.5),
        ("inverse-square-root", 500, 3e-4 * 0.1**0.5),
        ("inverse-square-root", 501, 1e-6),
    ],
)
def test_schedule_has_the_reference_numbers(schedule: Any, n: int, expected: float) -> None:
    assert lr_at(n, schedule=schedule, **G6) == pytest.approx(expected, rel=1e-12)


def test_the_inverse_square_root_has_the_digits_that_the_reference_gives() -> None:
    rates = [lr_at(n, schedule="inverse-square-root", **G6) for n in (51, 275, 500)]
    assert [f"{rate:.5e}" for rate in rates] == ["2.97044e-04", "1.27920e-04", "9.48683e-05"]
    assert lr_at(400, schedule="inverse-square-root", **(G6 | {"min_lr": 2e-4})) == 2e-4, "never below min_lr"
    assert lr_at(0, schedule="inverse-square-root", **(G6 | {"warmup_steps": 0})) == 3e-4


def test_the_inverse_square_root_without_warmup_depends_on_the_unit() -> None:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "schedule": "inverse-square-root"}
    assert lr_at(1, decay_steps=4, **settings) == 1.0, "the first step, counted in steps"
    assert lr_at(16, decay_steps=64, **settings) == 0.25, "the same step, counted in samples, 16 of them"


def test_without_warmup_the_first_step_is_already_on_the_way_down() -> None:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "decay_steps": 4, "schedule": "linear"}
    assert [lr_at(n, **settings) for n in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("style", "n", "expected"),
    [
        ("linear", 0, 0.01),
        ("linear", 125, 0.0325),
        ("linear", 250, 0.055),
        ("cosine", 125, 0.0231801948466),
        ("cosine", 250, 0.055),
        ("linear", 500, 0.1),
        ("cosine", 500, 0.1),
        ("cosine", 501, 0.1),
        ("constant", 0, 0.1),
        ("constant", 125, 0.1),
    ],
)
def test_weight_decay_has_the_reference_numbers(style: Any, n: int, expected: float) -> None:
    assert weight_decay_at(n, start=0.01, end=0.1, ramp_steps=500, style=style) == pytest.approx(expected, rel=1e-9)


def test_a_batch_grows_as_the_reference_s_does() -> None:
    consumed = [0, 16, 32, 48, 64, 88, 112, 144, 176, 216, 264, 320]
    assert [G7.size_at(n) for n in consumed] == [16, 16, 16, 16, 24, 24, 32, 32, 40, 48, 56, 64]
    assert [G7.samples_of(steps) for steps in range(len(consumed))] == consumed
    assert G7.size_at(10**9) == 64


def test_a_constant_batch() -> None:
    assert [BatchSchedule(global_batch_size=64).samples_of(steps) for steps in range(3)] == [0, 64, 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 0}, r"^global_batch_size=0 must be at least 1$"),
        ({"start": 72}, r"start between 1 and global_batch_size=64.* not start=72, increment=8, ramp_samples=300$"),
        ({"increment": 0}, r"not start=16, increment=0"),
        ({"ramp_samples": 0}, r"ramp_samples=0$"),
        ({"increment": 9}, r"^from start=16 by increment=9 the batch never is global_batch_size=64\..* increment divides 48$"),
    ],
)
def test_ramps_that_lead_nowhere_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSchedule(**({"global_batch_size": 64, "start": 16, "increment": 8, "ramp_samples": 300} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lamb"}, r"^kind='lamb' is not supported\. Legal here: adamw, sgd$"),
        ({"beta2": 1.0}, r"^beta2=1\.0 must be at least 0 and less than 1$"),
        ({"momentum": -0.1}, r"^momentum=-0\.1 must be at least 0 and less than 1$"),
        ({"clip_grad": float("nan")}, r"^clip_grad=nan must be a finite number$"),
        ({"eps": -1.0}, r"^eps=-1\.0 must be at least 0$"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**changes)


def test_whoever_asks_for_a_schedule_needs_no_torch() -> None:
    code = "import sys, megatron_core_impl.optim, megatron_core_impl.loss_scale; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
