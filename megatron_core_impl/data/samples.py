"""What training reads, whatever it was made from: rows of tokens, and how rows become a rectangular batch.

`Samples` is the one thing that training knows about data: sample k, the same one whoever asks, in training order. Text
(`gpt_dataset`) and conversations implement it, and a blend of either does too. Shapes: n tokens of a row, B rows of a micro
batch, S tokens that each of them is padded to.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import IndexedDataset

PAD_ID = 0  # of a token that nothing is learnt from and that nothing sees: any id of any vocabulary will do

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Row(NamedTuple):
    """One sample as training reads it."""

    tokens: Ints  # [n]
    labels: Ints  # [n] what each position predicts
    weights: Floats | None = None  # [n] what each label counts; None: 1
    position_ids: Ints | None = None  # [n] None: 0 … n-1
    document_lengths: tuple[int, ...] | None = None  # of the documents attention stays inside, sum n; None: one
    answers: Bools | None = None  # [n] labels that are an answer, for an evaluation's metrics


EMPTY_ROW = Row(np.empty(0, np.int64), np.empty(0, np.int64))  # all padding: fills a batch that has too few rows


class Samples(Protocol):
    """The samples of a run, in the order of their use."""

    def __len__(self) -> int: ...
    def __getitem__(self, k: int) -> Row: ...
    def length(self, k: int) -> int:
        """n of a row, without reading it."""

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        """What a row is made of: a dataset, and the numbers of its sequences. For those who look for the cause of an error."""


class HostBatch(NamedTuple):
    """The rows of a micro batch, all of one length."""

    tokens: Ints  # [B, S]
    labels: Ints  # [B, S]
    weights: Floats  # [B, S]
    position_ids: Ints | None  # [B, S] None: 0 … S-1 in every row
    document_lengths: tuple[int, ...] | None  # of all B·S tokens, row after row; None: every row is one document
    answers: Bools | None = None  # [B, S]


def collate(rows: Sequence[Row], width: int) -> HostBatch:
    """Pad rows on the right to a width: with tokens that weigh nothing, and are a document of their own.

    Raises:
        ValueError: a row is longer than that.
    """
    shape = (len(rows), width)
    tokens, labels = np.full(shape, PAD_ID, np.int64), np.full(shape, PAD_ID, np.int64)
    weights = np.zeros(shape)
    has_positions = any(row.position_ids is not None for row in rows)
    position_ids = np.zeros(shape, np.int64) if has_positions else None
    answers = np.zeros(shape, np.bool_) if any(row.answers is not None for row in rows) else None
    lengths: list[int] = []
    for b, row in enumerate(rows):
        n = len(row.tokens)
        if n > width:
            raise ValueError(f"a sample of {n} tokens does not fit rows of {width}")
        tokens[b, :n], labels[b, :n] = row.tokens, row.labels
        weights[b, :n] = 1.0 if row.weights is None else row.weights
        if position_ids is not None:
            position_ids[b, :n] = np.arange(n) if row.position_ids is None else row.position_ids
            position_ids[b, n:] = np.arange(width - n)
        if answers is not None and row.answers is not None:
            answers[b, :n] = row.answers
        own = row.document_lengths if row.document_lengths is not None else (n,)
        lengths += [length for length in (*own, width - n) if length]
    is_plain = lengths == [width] * len(rows)
    return HostBatch(tokens, labels, weights, position_ids, None if is_plain else tuple(lengths), answers)
