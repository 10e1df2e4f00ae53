"""Conversations as samples for training: one to a row, or packed.

They are read from the files of `conversation_encoder`, or from Megatron-LLM's, which have the same text and role streams. A
conversation of n tokens gives n - 1 pairs of input and label. What a label counts in the loss is the weight of its role times
that of its message. Everything goes by position: padding has weight 0 whatever its id, and a token with the id that others pad
with is a token like any other.

Which conversations are for training, and in which order they are used one to a row, is Megatron-LLM's (golden fact G5): one
stream of random numbers permutes all, the split cuts the permutation, and then each part is permuted once per epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.chat_template import ASSISTANT
from megatron_core_impl.data.checking import check_lengths
from megatron_core_impl.data.indexed_dataset import IndexedDataset, Tokens
from megatron_core_impl.data.packing import pack
from megatron_core_impl.data.samples import Row
from megatron_core_impl.data.splits import split_documents
from megatron_core_impl.data.streams import ROLE, TEXT, WEIGHT, idx_path

TooLong = Literal["drop", "truncate", "error"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """How conversations are read."""

    sequence_length: int  # pairs of input and label in a row, at most
    too_long: TooLong = "error"
    # What a label of system, user and assistant counts. Megatron-LLM's --scalar_loss_mask is that of the first two.
    role_weights: tuple[float, float, float] = (0.0, 0.0, 1.0)
    header_tokens: int = 0  # at the beginning of every answer, which no metric of answers counts
    marks_answers: bool = False  # fill in `Row.answers`, for an evaluation


class Conversations:
    """The conversations of a set, as rows: `conversations.row(i)`.

    Attributes:
        lengths: pairs of input and label of each, as read. [conversations]
        too_long: how many are longer than a row; what became of them is as `reading` says.
        too_short: how many have no pair, and are left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the streams do not belong together, or a conversation is too long and that is an error.
    """

    def __init__(self, prefix: Path | str, reading: Reading) -> None:
        self.reading = reading
        self._text = IndexedDataset(f"{prefix}{TEXT}")
        self._role = IndexedDataset(f"{prefix}{ROLE}")
        self._weight = IndexedDataset(f"{prefix}{WEIGHT}") if idx_path(f"{prefix}{WEIGHT}").is_file() else None
        check_lengths([self._text, self._role, *([] if self._weight is None else [self._weight])])
        longest = reading.sequence_length
        pairs = self._text.sizes.astype(np.int64) - 1
        is_long, is_short = pairs > longest, pairs < 1
        self.too_long, self.too_short = int(is_long.sum()), int(is_short.sum())
        if self.too_long and reading.too_long == "error":
            i = int(pairs.argmax())
            raise ValueError(
                f"{self._text.prefix}: {self.too_long:,} of {len(pairs):,} conversations have more than sequence_length + 1 = "
                f"{longest + 1:,} tokens; the longest, number {i:,}, has {pairs[i] + 1:,}. Raise sequence_length, or say what "
                'is to become of them: too_long: "drop" or "truncate"'
            )
        self._is_used = ~is_short & ~is_long if reading.too_long == "drop" else ~is_short
        self.lengths = np.minimum(pairs, longest)

    def __len__(self) -> int:
        """How many there are, used or not."""
        return len(self._text)

    def used(self, numbers: Ints) -> Ints:
        """Those of some conversations that are used, in the same order."""
        return numbers[self._is_used[numbers]]

    def tokens(self, i: int) -> Tokens:
        """The ids of conversation i, as they are stored."""
        return self._text[i]

    def roles(self, i: int) -> Tokens:
        """Whose each of its tokens is."""
        return self._role[i]

    def row(self, i: int) -> Row:
        """Conversation i."""
        reading, end = self.reading, int(self.lengths[i]) + 1
        ids, roles = self._text[i][:end].astype(np.int64), self._role[i][:end]
        if roles.max(initial=0) >= len(reading.role_weights):
            raise ValueError(f"{self._role.prefix}: conversation {i:,} has role {roles.max()}; known are 0, 1 and 2")
        weights = np.array(reading.role_weights)[roles[1:]]
        if self._weight is not None:
            weights *= self._weight[i][1:end]
        answers = _answers(roles, reading.header_tokens)[1:] if reading.marks_answers else None
        return Row(ids[:-1], ids[1:], weights, answers=answers)


def _answers(roles: npt.NDArray[np.integer[Any]], header_tokens: int) -> npt.NDArray[np.bool_]:
    """Which tokens are an answer or its end, and not its header."""
    is_assistant: npt.NDArray[np.bool_] = np.equal(roles, ASSISTANT)
    places = np.arange(len(roles))
    before = np.where(is_assistant, -1, places)  # the last token before that is not the assistant's
    is_assistant &= places - np.maximum.accumulate(before) > header_tokens
    return is_assistant


def split_conversations(n: int, split: str, seed: int) -> tuple[Ints, Ints, Ints]:
    """The train, valid and test conversations of a set of n: the split of a permutation.

    Raises:
        ValueError: `split` is no split.
    """
    order = np.random.RandomState(seed).permutation(n)
    train, valid, test = (order[part.start : part.stop] for part in split_documents(split, n))
    return train, valid, test


def reference_order(parts: Sequence[tuple[Ints, int]], seed: int, *, of_split: int | None = None) -> list[Ints]:
    """The order in which Megatron-LLM uses conversations: for each part (conversations, samples wanted) its samples.

    Args:
        of_split: the number of conversations that the parts are a split of. None: the part is a set of its own.

    Raises:
        ValueError: samples are wanted of a part without conversations.
    """
    random = np.random.RandomState(seed)
    if of_split is not None:
        random.permutation(of_split)  # what the split was made by
    orders = []
    for conversations, num_samples in parts:
        if num_samples and not len(conversations):
            raise ValueError(f"{num_samples:,} samples are wanted of no conversations. Give more of them, or another split")
        epochs, left = [], num_samples
        while left > 0:
            epochs.append(random.permutation(conversations)[:left])
            left -= len(epochs[-1])
        orders.append(np.concatenate(epochs) if epochs else np.empty(0, np.int64))
    return orders


class ConversationSamples:
    """One conversation to a row, rows of their own lengths: `Samples` in a given order."""

    def __init__(self, conversations: Conversations, order: Ints) -> None:
        self._conversations = conversations
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, k: int) -> Row:
        return self._conversations.row(int(self._order[k]))

    def length(self, k: int) -> int:
        """See `Samples`."""
        return int(self._conversations.lengths[self._order[k]])


class PackedConversations:
    """Several conversations to a row: `Samples`. Attention and positions are those of each conversation alone.

    Every conversation is in exactly one row. An epoch uses all rows once, in an order of its own, which like everything here is
    a function of (seed, epoch).

    Args:
        chosen: the conversations to use, such as a part of a split.
        num_samples: how many rows there are to be, over all epochs.

    Attributes:
        rows_per_epoch: how many rows an epoch has.
        efficiency: the part of the rows that is no padding.

    Raises:
        ValueError: there are no conversations.
    """

    def __init__(self, conversations: Conversations, chosen: Ints, *, num_samples: int, seed: int) -> None:
        if num_samples and not len(chosen):
            raise ValueError(f"{num_samples:,} samples are wanted of no conversations. Give more of them, or another split")
        self._conversations = conversations
        self._chosen = np.sort(chosen)
        self._packing = pack(conversations.lengths[self._chosen], conversations.reading.sequence_length)
        self._num_samples = num_samples
        self._order = lru_cache(maxsize=2)(self._shuffled)  # of an epoch; a batch may lie in two
        self.seed = seed
        self.rows_per_epoch = len(self._packing)
        self.efficiency = self._packing.efficiency

    def _shuffled(self, epoch: int) -> Ints:
        return np.random.RandomState([self.seed, epoch]).permutation(self.rows_per_epoch)

    def conversations_of(self, k: int) -> Ints:
        """The numbers of the conversations in row k."""
        if not 0 <= k < self._num_samples:
            raise IndexError(f"sample {k} of {self._num_samples}")
        epoch, place = divmod(k, self.rows_per_epoch)
        return self._chosen[self._packing.row(self._order(epoch)[place])]

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, k: int) -> Row:
        rows = [self._conversations.row(int(i)) for i in self.conversations_of(k)]
        lengths = tuple(len(row.tokens) for row in rows)
        return Row(
            tokens=np.concatenate([row.tokens for row in rows]),
            labels=np.concatenate([row.labels for row in rows]),
            weights=np.concatenate([row.weights for row in rows if row.weights is not None]),
            position_ids=np.concatenate([np.arange(length) for length in lengths]),
            document_lengths=lengths,
            answers=np.concatenate([row.answers for row in rows if row.answers is not None])
            if self._conversations.reading.marks_answers
            else None,
        )

    def length(self, k: int) -> int:
        """See `Samples`."""
        return int(self._conversations.lengths[self.conversations_of(k)].sum())
