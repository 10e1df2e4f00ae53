"""Loss scaling: the reference's rules (golden fact G8), and that they survive a checkpoint."""

import json
from math import log2

import pytest

from megatron_core_impl.loss_scale import DynamicLossScale, LossScale, StaticLossScale

IS_INFINITE = [1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]
EXPONENTS = [32, 31, 30, 30, 30, 30, 31, 31, 31, 30, 29]


def test_the_scale_moves_as_the_reference_s_does() -> None:
    scale = DynamicLossScale(window=4)
    found = []
    for is_infinite in IS_INFINITE:
        scale.update(not is_infinite)
        found.append(log2(scale.scale))
    assert found == EXPONENTS


def test_a_back_off_does_not_restore_the_patience() -> None:
    scale = DynamicLossScale(initial=1024.0, window=2, hysteresis=3)
    halved = []
    for is_finite in [False] * 4 + [True, False, True, True] + [False] * 3:
        before = scale.scale
        scale.update(is_finite)
        halved.append(scale.scale < before)
    assert halved == [False, False, True, True, False, True, False, False, False, False, True]


def test_the_scale_does_not_fall_below_its_minimum() -> None:
    scale = DynamicLossScale(initial=8.0, minimum=2.0, hysteresis=1)
    for _ in range(5):
        scale.update(is_finite=False)
    assert scale.scale == 2.0


@pytest.mark.parametrize("done", range(len(IS_INFINITE)))
def test_a_scale_goes_on_from_a_checkpoint(done: int) -> None:
    first, second = DynamicLossScale(window=4), DynamicLossScale(window=4)
    for is_infinite in IS_INFINITE[:done]:
        first.update(not is_infinite)
    second.load_state(json.loads(json.dumps(first.state())))
    for is_infinite, exponent in zip(IS_INFINITE[done:], EXPONENTS[done:], strict=True):
        second.update(not is_infinite)
        assert log2(second.scale) == exponent


def test_a_static_scale_stays() -> None:
    scale: LossScale = StaticLossScale(128.0)
    scale.update(is_finite=False)
    scale.load_state(json.loads(json.dumps(scale.state())))
    assert scale.scale == 128.0


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss_scale=0 must be positive$"):
        StaticLossScale(0)
    with pytest.raises(ValueError, match=r"^initial_loss_scale=1\.0 must be at least min_loss_scale=2\.0, and both positive$"):
        DynamicLossScale(initial=1.0, minimum=2.0)
    with pytest.raises(ValueError, match=r"^loss scale: window=0 must be at least 1$"):
        DynamicLossScale(window=0)
    with pytest.raises(ValueError, match=r"^the checkpoint's state of the loss scale has \[\].* start anew"):
        DynamicLossScale().load_state(StaticLossScale().state())
