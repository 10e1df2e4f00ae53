"""Steps, tokens, epochs: one is given, the others follow."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_core_impl.optim import BatchSchedule
from stages.contracts.config import PipelineConfig
from stages.contracts.length import described, length_of
from stages.contracts.train_settings import LayoutSettings, TrainSettings


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"sequence_length": 1024, "global_batch_size": 10} | changes)


GROWING = {"ramp_start": 2, "ramp_increment": 4, "ramp_samples": 12}  # batches 2 2 2 6 10 10 …


@pytest.mark.parametrize(
    "schedule",
    [
        BatchSchedule(global_batch_size=10),
        BatchSchedule(global_batch_size=10, start=2, increment=4, ramp_samples=12),
        BatchSchedule(global_batch_size=10, start=10, increment=1, ramp_samples=3),
    ],
)
def test_steps_within_is_the_inverse_of_samples_of(schedule: BatchSchedule) -> None:
    for samples in range(80):
        steps = schedule.steps_within(samples)
        assert schedule.samples_of(steps) <= samples < schedule.samples_of(steps + 1)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 70 * 1024}, 7),
        ({"tokens": 80 * 1024 - 1}, 7),
        ({"epochs": 1}, 9),  # 100,000 tokens are 97 samples
        ({"epochs": 2.5}, 24),
        ({"tokens": 32 * 1024, **GROWING}, 6),
        ({"epochs": 0.32768, **GROWING}, 5),  # one token short of 32 samples, as the last label is missing
    ],
)
def test_the_others_follow(given: dict[str, Any], steps: int) -> None:
    train = settings(**given)
    assert train.train_config(100_000).steps == steps
    length = length_of(train, 100_000)
    assert length is not None
    assert (length.steps, length.tokens) == (steps, train.batches().samples_of(steps) * 1024)
    assert length.epochs == length.tokens / 100_000


def test_an_epoch_takes_no_token_twice() -> None:
    """Whole epochs do not begin another: the index of samples would have to go on."""
    for epochs in (1, 2, 3):
        samples = settings(epochs=epochs, global_batch_size=1, sequence_length=10).train_config(101).samples
        assert samples * 10 + 1 <= epochs * 101 < (samples + 1) * 10 + 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "the length is given by exactly one of steps, epochs and tokens, and none of them is given"),
        ({"steps": 1, "tokens": 5}, "the length is given by exactly one of steps, epochs and tokens, not steps and tokens"),
        ({"tokens": 10_239}, "tokens=10,239 is less than one step of 10 × 1,024 tokens: train for longer, or lower"),
        ({"tokens": 102_400, "warmup_steps": 10}, "warmup_steps=10 must be less than the 10 steps of the schedule"),
    ],
)
def test_what_is_no_length(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(text)):
        settings(**given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"epochs": 0.1}, "epochs=0.1 of 100,000 tokens each is less than one step of 10 × 1,024 tokens"),
        ({"epochs": 1, "warmup_steps": 9}, "warmup_steps=9 must be less than the 9 steps of the schedule"),
        ({"epochs": 1, "skip_steps": (10,)}, "skip_steps has 10, but steps are counted from 1 to 9"),
    ],
)
def test_epochs_are_refused_once_they_are_known(given: dict[str, Any], text: str) -> None:
    train = settings(**given)
    with pytest.raises(ValueError, match=re.escape(text)):
        train.train_config(100_000)


def test_epochs_need_no_dataset_to_be_checked() -> None:
    """Batches against the layout, as for any other length."""
    base: dict[str, Any] = {"model": {"source": "a/b"}, "data": {"source": "c/d"}}
    assert PipelineConfig(**base, train=settings(epochs=3), layout=LayoutSettings(dp=2)).train.batches().sizes[-1] == 10
    with pytest.raises(ValidationError, match=r"train\.global_batch_size=10 is not a multiple of"):
        PipelineConfig(**base, train=settings(epochs=3), layout=LayoutSettings(dp=4))


def test_as_people_read_it() -> None:
    assert described(settings(steps=500, global_batch_size=1000), 502_000_000) == (
        "500 steps × 1,000 × 1,024 = 512 M tokens = 1.02 epochs"
    )
    assert described(settings(steps=5), None) == "5 steps × 10 × 1,024 = 51.2 K tokens"
    assert described(settings(epochs=3), None) == "3 epochs, in steps of 10 × 1,024 tokens"
    assert described(settings(epochs=3, **GROWING), 100_000) == "32 steps × 2 … 10 × 1,024 = 299 K tokens = 2.99 epochs"
