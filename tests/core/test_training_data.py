"""From the datasets of a job to its samples: roles and splits, blends, what is empty, budgets of evaluation, lengths."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexed_writer import IndexedDatasetWriter
from tiny_job import CONFIG
from tiny_training import MODEL

from megatron_core_impl.data.blend import Blend
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.train_config import DataSet, Job, TrainConfig
from megatron_core_impl.training_data import open_data, prepare, tokens_per_epoch


def put(folder: Path, name: str, documents: int, value: int, **more: Any) -> DataSet:
    """A set of documents of 20 tokens, all of them `value` plus the number of the document."""
    with IndexedDatasetWriter(folder / name, np.int32) as writer:
        for i in range(documents):
            writer.add_sequence([value + i] * 20)
            writer.end_document()
    return DataSet(prefix=folder / name, fingerprint=name, **more)


def job_of(folder: Path, *sets: DataSet, cache: bool = False, **settings: Any) -> Job:
    config = replace(CONFIG, **settings)  # 6 steps of 8 samples of 16 tokens
    return Job(
        config=config, model=MODEL, weights=folder, sets=sets, folder=folder, cache=folder / "cache" if cache else None
    )  # fmt: skip


def values(samples: Samples | None) -> set[int]:
    """All tokens that some samples hold."""
    assert samples is not None
    return {int(token) for k in range(len(samples)) for token in samples[k].tokens}


def test_one_set_is_split(tmp_path: Path) -> None:
    data = open_data(job_of(tmp_path, put(tmp_path, "a", 10, 0), split="6,2,2"))
    assert values(data.train) == set(range(6))
    assert values(data.valid) == {6, 7}
    assert values(data.test) == {8, 9}
    assert len(data.train) >= 48


def test_sets_of_a_role_are_taken_whole(tmp_path: Path) -> None:
    """The split is for others, whatever it is."""
    sets = [put(tmp_path, role, 10, value, role=role) for role, value in (("train", 0), ("valid", 100), ("test", 200))]
    data = open_data(job_of(tmp_path, *sets, split="1,0,0"))
    assert [values(samples) for samples in (data.train, data.valid, data.test)] == [
        set(range(value, value + 10)) for value in (0, 100, 200)
    ]


def test_a_blend_by_weights_that_sum_to_anything(tmp_path: Path) -> None:
    sets = put(tmp_path, "a", 10, 0, weight=3), put(tmp_path, "b", 20, 100, weight=1)
    data = open_data(job_of(tmp_path, *sets, split="8,2,0", eval_batches=1))
    assert isinstance(data.train, Blend)
    assert len(data.train) == 48
    assert np.bincount(data.train.part).tolist() == [36, 12]
    assert values(data.train) <= {*range(8), *range(100, 116)}
    assert values(data.valid) <= {8, 9, *range(116, 120)}
    assert data.test is None
    assert tokens_per_epoch(job_of(tmp_path, *sets, split="8,2,0")) == 24 * 20


def test_a_set_that_gives_a_role_nothing_is_left_out(tmp_path: Path) -> None:
    lines: list[str] = []
    sets = put(tmp_path, "a", 10, 0, weight=2), put(tmp_path, "b", 1, 100, weight=1), put(tmp_path, "c", 10, 200, weight=1)
    data = open_data(job_of(tmp_path, *sets, split="8,2,0"), lines.append)
    assert isinstance(data.valid, Blend)
    assert values(data.valid) == {8, 9, 208, 209}
    assert np.bincount(data.train.part).tolist() == [24, 12, 12]  # type: ignore[attr-defined]
    assert lines == [
        f"valid: {tmp_path / 'b'} has 0 tokens for it, less than one sample, and is left out; the weights of the others grow",
    ]


@pytest.mark.parametrize(("split", "role"), [("0.001,1,0", "train"), ("1,0,0", "valid")])
def test_nothing_at_all_is_refused(tmp_path: Path, split: str, role: str) -> None:
    text = f"no dataset has the 17 tokens of one sample for {role}: give more text or a dataset of role {role}, change split"
    with pytest.raises(ValueError, match=text):
        open_data(job_of(tmp_path, put(tmp_path, "a", 10, 0), put(tmp_path, "b", 10, 0), split=split))


def test_held_out_samples_are_not_repeated(tmp_path: Path) -> None:
    """4 documents are 4 samples, however many an evaluation may read; in a blend a small set gives what it has."""
    big, small = put(tmp_path, "big", 40, 0), put(tmp_path, "small", 10, 100)
    assert len(open_data(job_of(tmp_path, small, split="6,4,0", eval_batches=50)).valid) == 4
    valid = open_data(job_of(tmp_path, big, small, split="6,4,0", eval_batches=2)).valid
    assert isinstance(valid, Blend)
    assert np.bincount(valid.part).tolist() == [8, 4]
    seen = [tuple(valid[k].tokens) for k in range(len(valid))]
    assert len(set(seen)) == len(seen) == 12


def test_the_cache_is_filled_before_and_shared(tmp_path: Path) -> None:
    sets = put(tmp_path, "a", 10, 0), put(tmp_path, "b", 10, 100)
    job = job_of(tmp_path, *sets, cache=True, split="6,2,2")
    prepare(job)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert len(made) == 3 * 2 * 3 + 2, "three arrays of each set for each role, and the blends of training and of evaluation"
    cached, fresh = open_data(job), open_data(job_of(tmp_path, *sets, split="6,2,2"))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")} == made
    for ours, theirs in ((cached.train, fresh.train), (cached.valid, fresh.valid)):
        assert len(ours) == len(theirs)
        assert all((ours[k].tokens == theirs[k].tokens).all() for k in range(len(ours)))
    prepare(replace(job, sets=(replace(sets[0], fingerprint="other"), sets[1])))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == len(made) + 3 * 3, "other content, other indices"


# How much is evaluated


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(
        **{"steps": 500, "sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 8, "lr": 1.0} | settings
    )


def rows_of(one: TrainConfig, interval: int, dp: int) -> int:
    """What a run computes to evaluate, counted by hand: before, on the way and after, and the test, in whole micro batches."""
    evaluations = 2 + sum(step % interval == 0 or step == one.steps for step in range(1, one.steps + 1))
    unit = one.micro_batch_size * dp
    return evaluations * -(-one.eval_samples // unit) * unit


@pytest.mark.parametrize(
    ("settings", "dp"),
    [
        ({}, 1), ({"steps": 10}, 1), ({"steps": 30, "global_batch_size": 1}, 1), ({"eval_interval": 1}, 1),
        ({"eval_interval": 7}, 1), ({"ramp_start": 2, "ramp_increment": 2, "ramp_samples": 500}, 2), ({"steps": 99}, 1),
        ({"steps": 101}, 1), ({"eval_interval": 10**6}, 1),
        ({"steps": 50, "global_batch_size": 1, "eval_interval": 1}, 1),
        ({"steps": 400, "micro_batch_size": 16, "global_batch_size": 16, "eval_interval": 10}, 1),
        ({"steps": 1000, "micro_batch_size": 8, "global_batch_size": 64, "eval_interval": 10}, 8),
        ({"steps": 100, "micro_batch_size": 4, "global_batch_size": 32, "eval_interval": 5}, 8),
        ({"steps": 2000, "global_batch_size": 16}, 2), ({"steps": 300, "micro_batch_size": 2, "global_batch_size": 12}, 3),
    ],
)  # fmt: skip
def test_by_default_evaluations_cost_less_than_5_percent(settings: dict[str, Any], dp: int) -> None:
    """With a step at three forward passes: at the interval that is asked for, or else at the next multiple of it that does."""
    one = config(**settings)
    interval, allowed = one.eval_every(dp), 3 * one.samples / 20
    assert interval % one.eval_interval == 0
    assert rows_of(one, interval, dp) < allowed
    shorter = max(one.eval_interval, interval - one.eval_interval)
    assert interval == one.eval_interval or rows_of(one, shorter, dp) >= allowed
    more = replace(one, eval_batches=-(-(one.eval_samples + 1) // one.global_batch_size))
    assert rows_of(more, one.eval_interval, 1) >= allowed or one.eval_samples == 100 * 8, "and no whole batch less than that"


def test_how_much_is_evaluated_is_the_same_under_any_layout() -> None:
    """Else the held-out loss of a run that goes on elsewhere would be another. How often may differ."""
    settings = {"steps": 60, "global_batch_size": 16, "eval_interval": 10}
    fine, coarse = config(**settings), config(**settings, micro_batch_size=4)
    assert fine.eval_samples == coarse.eval_samples == 16
    settings["steps"], settings["eval_interval"] = 40, 4
    fine, coarse = config(**settings), config(**settings, micro_batch_size=4)
    assert fine.eval_samples == coarse.eval_samples == 4, "an equal part of a batch"
    assert [fine.eval_every(1), fine.eval_every(4), coarse.eval_every(1), coarse.eval_every(4)] == [4, 4, 4, 16]


def test_a_run_too_short_for_its_budget_evaluates_at_both_ends() -> None:
    one = config(steps=3, global_batch_size=1, eval_interval=1)
    assert (one.eval_samples, one.eval_every(1)) == (1, 3)


def test_what_is_asked_for_is_evaluated() -> None:
    assert config(steps=10**6, eval_interval=10**5).eval_samples == 100 * 8, "more than enough is not"
    asked = config(eval_batches=3, eval_interval=1)
    assert (asked.eval_samples, asked.eval_every(1)) == (24, 1)


def test_going_on_evaluates_the_same_samples(tmp_path: Path) -> None:
    one = put(tmp_path, "a", 10, 0)
    assert job_of(tmp_path, one, eval_interval=3).must_agree() == job_of(tmp_path, one).must_agree()
    by_default = [job_of(tmp_path, one, eval_batches=None, eval_interval=n).must_agree() for n in (2, 3)]
    assert by_default[0] != by_default[1], "the interval decides how many"
