"""From sets of conversations to the samples of a job: roles, packing, the reference's order, lengths, what is too long."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversation_files import write, write_random
from tiny_job import CONFIG
from tiny_training import MODEL

from megatron_core_impl.data import instruction_dataset
from megatron_core_impl.data.instruction_dataset import reference_order, split_conversations
from megatron_core_impl.data.packing import pack
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.train_config import DataSet, Job
from megatron_core_impl.training_data import check_data, conversation_figures, open_data, tokens_per_epoch

SIZES = [4 + n % 9 for n in range(40)]  # tokens


def job_of(folder: Path, *sets: DataSet, **settings: Any) -> Job:
    config = replace(CONFIG, split="8,2,0", **settings)  # 6 steps of 8 samples of 16 tokens
    return Job(config=config, model=MODEL, weights=folder, sets=sets, content="conversations", folder=folder)


def put(folder: Path, name: str, sizes: list[int], first: int = 0, **more: Any) -> DataSet:
    """Conversations all of whose tokens are their number."""
    texts = [[first + number] * size for number, size in enumerate(sizes)]
    roles = [[1] * (size // 2) + [2] * (size - size // 2) for size in sizes]
    return DataSet(prefix=write(folder / name, texts, roles), fingerprint=name, **more)


def of_each(samples: Samples | None, count: int | None = None) -> list[set[int]]:
    """The conversations in each sample."""
    assert samples is not None
    return [set(samples[k].tokens.tolist()) for k in range(len(samples) if count is None else count)]


def test_packed(tmp_path: Path) -> None:
    job = job_of(tmp_path, put(tmp_path, "a", SIZES))
    lines: list[str] = []
    data = open_data(job, lines.append)
    train, valid, _ = split_conversations(40, "8,2,0", CONFIG.seed)
    per_epoch = (tokens_per_epoch(job) - 1) // 16
    rows = of_each(data.train)
    assert len(rows) == 48
    for epoch in range(48 // per_epoch):
        used = [number for row in rows[epoch * per_epoch : (epoch + 1) * per_epoch] for number in row]
        assert sorted(used) == sorted(train), "each conversation once per epoch"
    held_out = [number for row in of_each(data.valid) for number in row]
    assert sorted(held_out) == sorted(valid), "once, as there are fewer than the budget allows"
    assert data.test is None
    assert lines[0].startswith(f"train: 32 conversations of a, packed into {per_epoch} samples of 16, 9")
    assert [line.partition(":")[0] for line in lines] == ["train", "valid"], "and of no test"
    assert data.valid_in_all == len(data.valid)
    assert data.valid[0].answers is not None
    assert data.train[0].answers is None


def test_one_to_a_sample_in_the_order_of_the_reference(tmp_path: Path) -> None:
    job = job_of(tmp_path, put(tmp_path, "a", SIZES), packing=False)
    data = open_data(job)
    train, valid, test = split_conversations(40, "8,2,0", CONFIG.seed)
    wanted = reference_order([(train, 48), (valid, 8), (test, 0)], CONFIG.seed, of_split=40)
    assert of_each(data.train) == [{number} for number in wanted[0]]
    assert of_each(data.valid) == [{number} for number in wanted[1]]
    assert tokens_per_epoch(job) == 32 * 16 + 1


@pytest.mark.parametrize("packing", [True, False])
def test_sets_of_a_role_and_a_blend(tmp_path: Path, packing: bool) -> None:
    sets = (
        put(tmp_path, "a", SIZES, role="train", weight=3), put(tmp_path, "b", SIZES, 100, role="train", weight=1),
        put(tmp_path, "v", SIZES[:5], 200, role="valid"),
    )  # fmt: skip
    data = open_data(job_of(tmp_path, *sets, packing=packing))
    of_a = sum(max(row) < 100 for row in of_each(data.train))
    assert (of_a, len(data.train)) == (36, 48)
    assert set.union(*of_each(data.valid)) == set(range(200, 205))


def test_weights_of_roles(tmp_path: Path) -> None:
    settings = {"system_weight": 0.0, "user_weight": 0.25, "assistant_weight": 2.0, "packing": False}
    row = open_data(job_of(tmp_path, put(tmp_path, "a", [8] * 40), **settings)).train[0]
    assert row.weights is not None
    assert row.weights.tolist() == [0.25, 0.25, 0.25, 2, 2, 2, 2], "of labels: from the second token on"


def test_too_long(tmp_path: Path) -> None:
    sets = put(tmp_path, "a", [*SIZES, 30, 40])
    with pytest.raises(ValueError, match=r"2 of 42 conversations have more than sequence_length \+ 1 = 17 tokens"):
        open_data(job_of(tmp_path, sets))
    lines: list[str] = []
    dropped = open_data(job_of(tmp_path, sets, too_long="drop"), lines.append)
    assert lines[0] == "a: of 42 conversations 2 too long, left out"
    assert not any("too long" in line for line in lines[1:]), "told once for all roles"
    assert not {40, 41} & set.union(*of_each(dropped.train))
    cut = open_data(job_of(tmp_path, sets, too_long="truncate", packing=False), lines.append)
    assert max(cut.train.length(k) for k in range(len(cut.train))) == 16
    assert "a: of 42 conversations 2 too long, cut off; 1 with nothing to learn, left out" in lines


NOTHING = "no dataset has a conversation left for train: of the 32 that a has for it, "


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"too_long": "drop"},
            "all are too long and left out (the longest of the set has 40 tokens, sequence_length + 1 is 17): raise "
            'sequence_length, or set too_long to "truncate"',
        ),
        (
            {"too_long": "truncate"},
            "all are without anything to learn: no label in the first sequence_length + 1 = 17 tokens has a weight above 0. "
            "That is the weight of its role (system_weight=0, user_weight=0, assistant_weight=1) times that of its message: "
            "raise one of these, or sequence_length",
        ),
    ],
)  # fmt: skip
def test_nothing_is_left(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    job = job_of(tmp_path, put(tmp_path, "a", [40] * 40), **settings)
    for looks in (open_data, check_data):
        with pytest.raises(ValueError, match=re.escape(NOTHING + text)):
            looks(job)


def test_what_cannot_teach_is_left_out_and_counted(tmp_path: Path) -> None:
    sets = put(tmp_path, "a", [*SIZES, 40, 60]), put(tmp_path, "b", [8] * 10, 100)
    job = job_of(tmp_path, *sets, too_long="truncate")
    lines: list[str] = []
    data = open_data(job, lines.append)
    assert not {40, 41} & set.union(*of_each(data.train), *of_each(data.valid))
    assert lines[0] == "a: of 42 conversations 2 too long, cut off; 2 with nothing to learn, left out"
    assert [line.partition(", packed")[0].rpartition(" of ")[2] for line in lines[1:]] == ["a", "b", "a", "b"], (
        "each names its set"
    )
    figures = conversation_figures(job)
    tokens = sum(int(data.train.parts[n].length(k)) for n in (0, 1) for k in range(per_epoch(job, n)))  # type: ignore[attr-defined]
    assert figures.pop("packing_efficiency") == pytest.approx(tokens / (tokens_per_epoch(job) - 1), abs=1e-5)
    assert figures == {"conversations_too_long": 2, "conversations_too_short": 0, "conversations_nothing_to_learn": 2}


def per_epoch(job: Job, number: int) -> int:
    return (tokens_per_epoch(replace(job, sets=job.sets[number : number + 1])) - 1) // 16


def test_a_set_is_packed_once_for_each_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, where there is a cache, once for all who open it."""
    packed: list[int] = []
    monkeypatch.setattr(
        instruction_dataset, "pack", lambda lengths, capacity: packed.append(len(lengths)) or pack(lengths, capacity)
    )  # fmt: skip
    job = job_of(tmp_path, put(tmp_path, "a", SIZES))
    first = open_data(job)
    assert packed == [32, 8]
    job = replace(job, cache=tmp_path / "cache")
    for _ in range(2):
        again = open_data(job)
    assert packed == [32, 8] * 2
    assert of_each(again.train) == of_each(first.train)


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no dataset has a conversation for valid: give more conversations or a dataset of role"
    ):
        open_data(job_of(tmp_path, DataSet(prefix=write_random(tmp_path / "a", [9] * 2, 50), fingerprint="a")))


def test_same_for_all_who_ask(tmp_path: Path) -> None:
    job = job_of(tmp_path, put(tmp_path, "a", SIZES))
    one, other = open_data(job), open_data(job)
    for k in (0, 7, 47):
        assert np.array_equal(one.train[k].tokens, other.train[k].tokens)
