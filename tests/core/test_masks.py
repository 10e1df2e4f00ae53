"""What the end of a document means: golden fact G14, and the same facts found token by token."""

import numpy as np

from megatron_core_impl.data import masks

G14 = np.array([5, 6, 2, 7, 8, 2, 9, 3])


def visible(lengths: tuple[int, ...]) -> list[str]:
    """The mask that lengths stand for, as the golden facts write it: a row for each query."""
    return ["-" * sum(lengths[:d]) + "1" * (i + 1) for d, length in enumerate(lengths) for i in range(length)]


def test_golden() -> None:
    assert masks.position_ids(G14, 2).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert masks.loss_weights(G14, 2).tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert visible(masks.document_lengths(G14, 2)) == [
        "1", "11", "111", "---1", "---11", "---111", "------1", "------11",
    ]  # fmt: skip


def test_an_end_at_the_end_makes_no_empty_document() -> None:
    for tokens, lengths, positions, weights in (
        ([4, 2, 4], (2, 1), [0, 1, 0], [1, 0, 1]),
        ([4, 4, 2], (3,), [0, 1, 2], [1, 1, 0]),
        ([2, 2, 4], (1, 1, 1), [0, 0, 0], [0, 0, 1]),
        ([4, 4, 4], (3,), [0, 1, 2], [1, 1, 1]),
    ):
        assert masks.document_lengths(np.array(tokens), 2) == lengths
        assert masks.position_ids(np.array(tokens), 2).tolist() == positions
        assert masks.loss_weights(np.array(tokens), 2).tolist() == weights


def test_token_by_token() -> None:
    tokens = np.random.RandomState(1).randint(0, 5, 120)
    positions, lengths, place = [], [], 0
    for i, token in enumerate(tokens.tolist()):
        positions.append(place)
        place += 1
        if token == 2 or i == len(tokens) - 1:
            lengths.append(place)
            place = 0
    assert masks.position_ids(tokens, 2).tolist() == positions
    assert list(masks.document_lengths(tokens, 2)) == lengths
