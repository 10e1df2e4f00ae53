"""Conversations as rows: the reference's order (G5) and batches (G15), weights, and masks by position."""

import re
from pathlib import Path

import conversation_files
import numpy as np
import pytest

from megatron_core_impl.data.instruction_dataset import (
    Conversations,
    ConversationSamples,
    PackedConversations,
    Reading,
    packed,
    reference_order,
    split_conversations,
)
from megatron_core_impl.data.samples import collate

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"

TEXTS = [[10, 11, 12, 13, 14, 15], [20, 21, 22]]  # golden fact G15
ROLES = [[0, 1, 1, 2, 2, 2], [1, 2, 2]]


def opened(folder: Path, reading: Reading | None = None) -> Conversations:
    return Conversations(conversation_files.write(folder / "set", TEXTS, ROLES), reading or Reading(32))


def test_the_order_of_the_reference() -> None:
    """Golden fact G5."""
    train, valid, test = split_conversations(10, "8/1/1", 1234)
    assert [*train, *valid, *test] == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    orders = reference_order([(train, 13), (valid, 1), (test, 0)], 1234, of_split=10)
    assert [order.tolist() for order in orders] == [[5, 8, 4, 7, 0, 1, 9, 2, 5, 1, 8, 2, 0], [6], []]


def test_the_order_of_a_set_of_its_own() -> None:
    random = np.random.RandomState(7)
    want = [*random.permutation(5), *random.permutation(5)[:3]]
    (order,) = reference_order([(np.arange(5), 8)], 7)
    assert order.tolist() == want
    with pytest.raises(ValueError, match=r"3 samples are wanted of no conversations\. Give more of them, or another split"):
        reference_order([(np.empty(0, np.int64), 3)], 7)


def test_rows_of_the_reference(tmp_path: Path) -> None:
    """Golden fact G15: its width of 17 tokens is 16 pairs, its loss mask the weights of the labels."""
    rows = [opened(tmp_path, Reading(32, role_weights=(0.1, 0.1, 1.0))).row(i) for i in range(2)]
    width = -(-max(len(row.tokens) for row in rows) // 16) * 16
    assert width == 16
    batch = collate(rows, width)
    assert batch.tokens[0, :5].tolist() == [10, 11, 12, 13, 14]
    assert batch.labels[0, :5].tolist() == [11, 12, 13, 14, 15]
    assert batch.weights[0].tolist() == [0.1, 0.1, 1, 1, 1] + 11 * [0]
    assert batch.weights[1].tolist() == [1, 1] + 14 * [0]
    assert batch.document_lengths == (5, 11, 2, 14), "padding is a document of its own, which nothing else sees"
    assert collate(rows, 32).weights.shape == (2, 32)


def test_weights_are_those_of_role_and_message(tmp_path: Path) -> None:
    weights = [[1, 1, 0.5, 2, 2, 0], [3, 3, 3]]
    prefix = conversation_files.write(tmp_path / "set", TEXTS, ROLES, weights)
    own = Conversations(prefix, Reading(32, role_weights=(0.25, 0.5, 1)))
    assert own.row(0).weights.tolist() == [0.5, 0.25, 2, 2, 0]  # type: ignore[union-attr]
    assert own.row(1).weights.tolist() == [3, 3]  # type: ignore[union-attr]
    assert opened(tmp_path / "..").row(0).weights.tolist() == [0, 0, 1, 1, 1]  # type: ignore[union-attr]


def test_a_real_token_with_the_id_of_padding_counts(tmp_path: Path) -> None:
    """The reference masks by value, so that with pad = eos no end is ever learnt (hazard S3)."""
    prefix = conversation_files.write(tmp_path / "set", [[5, 0, 6, 0]], [[1, 1, 2, 2]])
    batch = collate([Conversations(prefix, Reading(8)).row(0)], 8)
    assert batch.labels[0].tolist() == [0, 6, 0] + 5 * [0]
    assert batch.weights[0].tolist() == [0, 1, 1] + 5 * [0]


@pytest.mark.parametrize(("header", "labels"), [(0, [1, 2, 4, 5, 6, 7, 8, 10, 11]), (2, [2, 6, 7, 8]), (3, [7, 8]), (9, [])])
def test_answers_are_without_their_header(tmp_path: Path, header: int, labels: list[int]) -> None:
    roles = [[2, 2, 2, 1, 2, 2, 2, 2, 2, 0, 2, 2]]
    prefix = conversation_files.write(tmp_path / "set", [list(range(12))], roles)
    answers = Conversations(prefix, Reading(32, header_tokens=header, marks_answers=True)).row(0).answers
    assert answers is not None
    assert (np.flatnonzero(answers) + 1).tolist() == labels
    assert Conversations(prefix, Reading(32, header_tokens=header)).row(0).answers is None


def test_an_answer_after_an_answer_has_a_header_too(tmp_path: Path) -> None:
    """Their roles do not tell them apart, but a header is the same each time."""
    texts = [[1, 5, 90, 91, 92, 6, 91, 92, 93, 90, 91, 92, 7, 90], [90, 91]]
    prefix = conversation_files.write(tmp_path / "set", texts, [[1] * 2 + [2] * 12, [2] * 2])
    conversations = Conversations(prefix, Reading(32, header_tokens=3, marks_answers=True))
    (_, first), (_, cut) = ((row.labels, row.answers) for row in (conversations.row(0), conversations.row(1)))
    assert first is not None
    assert cut is not None
    assert (np.flatnonzero(first) + 1).tolist() == [5, 6, 7, 8, 12, 13], "but not a part of one inside an answer"
    assert not cut.any()


def test_what_becomes_of_long_conversations(tmp_path: Path) -> None:
    everything = np.arange(2)
    cut = opened(tmp_path, Reading(4, "truncate"))
    assert cut.row(0).tokens.tolist() == [10, 11, 12, 13]
    assert cut.row(0).labels.tolist() == [11, 12, 13, 14]
    assert (cut.used(everything).tolist(), cut.defects(everything), cut.lengths.tolist()) == ([0, 1], (1, 0, 0), [4, 2])
    dropped = opened(tmp_path, Reading(4, "drop"))
    assert (dropped.used(everything).tolist(), dropped.defects(everything)) == ([1], (1, 0, 0))
    assert dropped.defects(np.array([1])) == (0, 0, 0)
    assert opened(tmp_path, Reading(5, "drop")).defects(everything) == (0, 0, 0)
    message = (
        "1 of 2 conversations have more than sequence_length + 1 = 5 tokens; the longest, number 0, has 6. Raise "
        'sequence_length, or say what is to become of them: too_long: "drop" or "truncate"'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(tmp_path, Reading(4))


def test_conversations_without_a_pair_are_left_out(tmp_path: Path) -> None:
    prefix = conversation_files.write(tmp_path / "set", [[1], [2, 3], []], [[2], [1, 2], []])
    short = Conversations(prefix, Reading(4))
    assert (short.used(np.arange(3)).tolist(), short.defects(np.arange(3))) == ([1], (0, 2, 0))


def test_conversations_without_anything_to_learn_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their rows say, in blocks of any size: cut off before the answer, of weight 0, or with an answer that is no label."""
    random = np.random.RandomState(0)
    roles = [[1] * 6 + [2] * 2, [2, 1, 1], [], [2], [0, 2]] + [
        random.randint(0, 3, n).tolist() for n in random.randint(0, 7, 60)
    ]
    weights = [random.choice([0.0, 0.5], len(of_one)).tolist() for of_one in roles]
    for given in (None, weights):
        prefix = conversation_files.write(tmp_path / f"set-{given is None}", roles, roles, given)
        for role_weights, block in (((0.0, 0.0, 1.0), 1), ((0.0, 0.1, 0.0), 7), ((1.0, 0.0, 1.0), 4096)):
            monkeypatch.setattr("megatron_core_impl.data.instruction_dataset.BLOCK", block)
            conversations = Conversations(prefix, Reading(5, "truncate", role_weights=role_weights))
            rows = {i: conversations.row(i) for i in range(len(roles)) if len(roles[i]) > 1}
            by_rows = [i for i, row in rows.items() if row.weights is not None and row.weights.any()]
            everything = np.arange(len(roles))
            assert conversations.used(everything).tolist() == by_rows
            found = conversations.defects(everything)
            assert found.nothing_to_learn == len(roles) - found.too_short - len(by_rows) > 0


def test_what_the_look_at_all_labels_finds_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, everything = conversation_files.write(tmp_path / "set", TEXTS, ROLES), np.arange(2)
    kept = {"cache": tmp_path / "cache", "fingerprint": "f"}
    assert Conversations(prefix, Reading(32), **kept).used(everything).tolist() == [0, 1]  # type: ignore[arg-type]
    assert Conversations(prefix, Reading(2, "truncate"), **kept).used(everything).tolist() == [1]  # type: ignore[arg-type]
    monkeypatch.delattr(Conversations, "_look_for_labels")
    assert Conversations(prefix, Reading(2, "truncate"), **kept).used(everything).tolist() == [1]  # type: ignore[arg-type]


def test_samples_in_order(tmp_path: Path) -> None:
    samples = ConversationSamples(opened(tmp_path), np.array([1, 0, 1]))
    assert len(samples) == 3
    assert [samples.length(k) for k in range(3)] == [len(samples[k].tokens) for k in range(3)] == [2, 5, 2]
    assert samples[1].tokens[0] == 10


def test_streams_that_do_not_fit(tmp_path: Path) -> None:
    prefix = conversation_files.write(tmp_path / "set", TEXTS, [[0, 1, 1, 2, 2, 2], [1, 2]])
    with pytest.raises(ValueError, match=r"set-role and .*set-text have conversations of other lengths. Make both again"):
        Conversations(prefix, Reading(32))
    prefix = conversation_files.write(tmp_path / "other", [[1, 2]], [[1, 7]])
    with pytest.raises(ValueError, match="conversation 0 has role 7; known are 0, 1 and 2"):
        Conversations(prefix, Reading(32)).row(0)
    prefix = conversation_files.write(tmp_path / "other", [[1, 2], [], [1, 2, 3]], [[1, 2], [], [1, 2, 5]])
    with pytest.raises(ValueError, match="conversation 2 has role 5; known are 0, 1 and 2"):
        Conversations(prefix, Reading(32)).used(np.arange(3))
    with pytest.raises(ValueError, match="2 samples are wanted of no conversations"):
        PackedConversations(opened(tmp_path), packed(opened(tmp_path), np.empty(0, np.int64)), num_samples=2, seed=1)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")
def test_files_of_the_reference_can_be_read() -> None:
    theirs = Conversations(
        GOLDEN / "instruct" / "instruct_system", Reading(512, "truncate", header_tokens=3, marks_answers=True)
    )
    assert len(theirs) == 400
    row = theirs.row(0)
    assert row.weights is not None
    assert row.answers is not None
    assert row.labels[row.weights > 0][:3].tolist() == [32000, 1234, 13], "<|im_start|>, answer, newline"
    assert row.labels[row.answers][-3:].tolist() == [32001, 29871, 13]
    assert row.weights.sum() == row.answers.sum() + 3
    assert packed(theirs, theirs.used(np.arange(400))).efficiency > 0.97
