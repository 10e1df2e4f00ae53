"""The learning-rate schedule: the reference's numbers (golden fact G6)."""

from typing import Any

import pytest

from megatron_core_impl.optim import lr_at

G6: dict[str, Any] = {"lr": 3e-4, "min_lr": 1e-6, "warmup_steps": 50, "decay_steps": 500}


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
    ],
)
def test_schedule_has_the_reference_numbers(schedule: Any, n: int, expected: float) -> None:
    assert lr_at(n, schedule=schedule, **G6) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_first_step_is_already_on_the_way_down() -> None:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "decay_steps": 4, "schedule": "linear"}
    assert [lr_at(n, **settings) for n in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
