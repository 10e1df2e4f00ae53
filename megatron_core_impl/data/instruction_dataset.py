"""Conversations as samples for training: one to a row, or packed.

They are read from the files of `conversation_encoder`, or from Megatron-LLM's, which have the same text and role streams. A
conversation of n tokens gives n - 1 pairs of input and label. What a label counts in the loss is the weight of its role times
that of its message. Everything goes by position: padding has weight 0 whatever its id, and a token with the id that others pad
with is a token like any other.

Which conversations are for training, and in which order they are used one to a row, is Megatron-LLM's (golden fact G5): one
stream of random numbers permutes all, the split cuts the permutation, and then each part is permuted once per epoch.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.chat_template import ASSISTANT
from megatron_core_impl.data.checking import check_lengths
from megatron_core_impl.data.index_cache import Arrays, cached
from megatron_core_impl.data.indexed_dataset import IndexedDataset, Tokens
from megatron_core_impl.data.packing import Packing, pack
from megatron_core_impl.data.samples import Row
from megatron_core_impl.data.splits import split_documents
from megatron_core_impl.data.streams import ROLE, TEXT, WEIGHT, idx_path

TooLong = Literal["drop", "truncate", "error"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BLOCK = 1 << 12  # conversations that are looked through at a time


@dataclass(frozen=True)
class Reading:
    """How conversations are read."""

    sequence_length: int  # pairs of input and label in a row, at most
    too_long: TooLong = "error"
    # What a label of system, user and assistant counts. Megatron-LLM's --scalar_loss_mask is that of the first two.
    role_weights: tuple[float, float, float] = (0.0, 0.0, 1.0)
    header_tokens: int = 0  # at the beginning of every answer, which no metric of answers counts
    marks_answers: bool = False  # fill in `Row.answers`, for an evaluation


class Defects(NamedTuple):
    """How many of some conversations are not used as they are."""

    too_long: int  # for a row; dropped or truncated, as `Reading` says
    too_short: int  # without a pair of input and label; left out
    nothing_to_learn: int  # that are read, but have no label with a weight above 0 there; left out


class Conversations:
    """The conversations of a set, as rows: `conversations.row(i)`.

    Args:
        cache: folder that keeps what looking through the roles and weights gives; None: it is done anew.
        fingerprint: of the set's content, for the cache.

    Attributes:
        text: the ids of all, as they are stored.
        lengths: pairs of input and label of each, as read. [conversations]
        longest: tokens of the longest conversation.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the streams do not belong together, or a conversation is too long and that is an error.
    """

    def __init__(
        self, prefix: Path | str, reading: Reading, *, cache: Path | None = None, fingerprint: str = ""
    ) -> None:  # fmt: skip
        self.reading = reading
        self._cache, self._fingerprint = cache, fingerprint
        self.text = IndexedDataset(f"{prefix}{TEXT}")
        self._role = IndexedDataset(f"{prefix}{ROLE}")
        self._weight = IndexedDataset(f"{prefix}{WEIGHT}") if idx_path(f"{prefix}{WEIGHT}").is_file() else None
        check_lengths([self.text, self._role, *([] if self._weight is None else [self._weight])])
        most = reading.sequence_length
        pairs = self.text.sizes.astype(np.int64) - 1
        self._is_long, self._is_short = pairs > most, pairs < 1
        self.longest = int(pairs.max(initial=-1)) + 1
        if reading.too_long == "error" and self._is_long.any():
            raise ValueError(
                f"{self.text.prefix}: {self._is_long.sum():,} of {len(pairs):,} conversations have more than sequence_length + "
                f"1 = {most + 1:,} tokens; the longest, number {pairs.argmax():,}, has {self.longest:,}. Raise "
                'sequence_length, or say what is to become of them: too_long: "drop" or "truncate"'
            )
        self._is_read = ~self._is_short & ~self._is_long if reading.too_long == "drop" else ~self._is_short
        self.lengths = np.clip(pairs, 0, most)

    def __len__(self) -> int:
        """How many there are, used or not."""
        return len(self.text)

    def used(self, numbers: Ints) -> Ints:
        """Those of some conversations that are used, in the same order."""
        return numbers[(self._is_read & self._teaches)[numbers]]

    def defects(self, numbers: Ints) -> Defects:
        """Why the others are not, or not whole."""
        masks = self._is_long, self._is_short, self._is_read & ~self._teaches
        return Defects(*(int(mask[numbers].sum()) for mask in masks))

    def marking_answers(self) -> Self:
        """The same, read for an evaluation."""
        marking = copy.copy(self)
        marking.reading = replace(self.reading, marks_answers=True)
        return marking

    @cached_property
    def _teaches(self) -> Bools:
        """Which conversations have a label with a weight above 0. [conversations]"""
        counting = [weight > 0 for weight in self.reading.role_weights]
        key = {
            "kind": "conversations that teach", "data": self._fingerprint, "roles": counting,
            "sequence_length": self.reading.sequence_length,
        }  # fmt: skip
        return cached(self._cache, key, lambda: {"teaches": self._look_for_labels(np.array(counting))})["teaches"]

    def _look_for_labels(self, is_counted: Bools) -> Bools:
        """The same, from the labels' roles and weights. `is_counted`: of each role."""
        teaches = np.empty(len(self), np.bool_)
        for first in range(0, len(self), BLOCK):
            numbers = range(first, min(first + BLOCK, len(self)))
            borders = np.concatenate(([0], np.cumsum(self.lengths[first : numbers.stop])))
            roles = self._labels_of(self._role, numbers)
            if (unknown := roles >= len(is_counted)).any():
                raise self._unknown_role(first + int(np.searchsorted(borders, unknown.argmax(), "right")) - 1)
            counts = is_counted[roles]
            if self._weight is not None:
                counts &= self._labels_of(self._weight, numbers) > 0
            so_far = np.concatenate(([0], np.cumsum(counts)))[borders]
            teaches[first : numbers.stop] = so_far[1:] > so_far[:-1]
        return teaches

    def _labels_of(self, stream: IndexedDataset, numbers: range) -> npt.NDArray[Any]:
        """What a stream says of the labels of some conversations, one after another."""
        ends = (1 + self.lengths[numbers.start : numbers.stop]).tolist()
        return np.concatenate([stream[i][1:end] for i, end in zip(numbers, ends, strict=True)])

    def _unknown_role(self, i: int) -> ValueError:
        return ValueError(f"{self._role.prefix}: conversation {i:,} has role {self._role[i].max()}; known are 0, 1 and 2")

    def tokens(self, i: int) -> Tokens:
        """The ids of conversation i, as they are stored."""
        return self.text[i]

    def roles(self, i: int) -> Tokens:
        """Whose each of its tokens is."""
        return self._role[i]

    def row(self, i: int) -> Row:
        """Conversation i."""
        reading, end = self.reading, int(self.lengths[i]) + 1
        ids, roles = self.text[i][:end].astype(np.int64), self._role[i][:end]
        if roles.max(initial=0) >= len(reading.role_weights):
            raise self._unknown_role(i)
        weights = np.array(reading.role_weights)[roles[1:]]
        if self._weight is not None:
            weights *= self._weight[i][1:end]
        answers = _answers(ids, roles, reading.header_tokens)[1:] if reading.marks_answers else None
        return Row(ids[:-1], ids[1:], weights, answers=answers)


def _answers(ids: Ints, roles: npt.NDArray[np.integer[Any]], header_tokens: int) -> Bools:
    """Which tokens are an answer or its end, and not its header: what it begins with, and what is the same inside of it.

    That is so where one answer follows another.
    """
    is_assistant: Bools = np.equal(roles, ASSISTANT)
    places = np.arange(len(roles))
    before = np.where(is_assistant, -1, places)  # the last token before that is not the assistant's
    is_answer: Bools = is_assistant & (places - np.maximum.accumulate(before) > header_tokens)
    if header_tokens and is_answer.any():
        header = ids[is_assistant.argmax() :][:header_tokens]
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(header))
        for start in np.flatnonzero((windows == header).all(1)):
            is_answer[start : start + header_tokens] = False
    return is_answer


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


def packed(conversations: Conversations, chosen: Ints, cache: Path | None = None) -> Packing:
    """Rows of some conversations: `Packing.sequences` are their numbers. A function of these and of their lengths.

    Args:
        cache: folder that keeps the packing of lengths; None: it is made anew.
    """
    chosen = np.sort(chosen)
    lengths, capacity = conversations.lengths[chosen], conversations.reading.sequence_length

    def make() -> Arrays:
        packing = pack(lengths, capacity)
        return {"sequences": packing.sequences, "starts": packing.starts, "efficiency": np.array([packing.efficiency])}

    key = {"kind": "packing", "lengths": hashlib.sha256(lengths.tobytes()).hexdigest(), "capacity": capacity}
    found = cached(cache, key, make)
    return Packing(chosen[found["sequences"]], found["starts"], float(found["efficiency"][0]))


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

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        """See `Samples`."""
        return self._conversations.text, [int(self._order[k])]


class PackedConversations:
    """Several conversations to a row: `Samples`. Attention and positions are those of each conversation alone.

    Every conversation is in exactly one row. An epoch uses all rows once, in an order of its own, which like everything here is
    a function of (seed, epoch).

    Args:
        packing: the rows of an epoch, of the conversations to use: `packed`.
        num_samples: how many rows there are to be, over all epochs.

    Raises:
        ValueError: there are no conversations.
    """

    def __init__(self, conversations: Conversations, packing: Packing, *, num_samples: int, seed: int) -> None:
        if num_samples and not len(packing):
            raise ValueError(f"{num_samples:,} samples are wanted of no conversations. Give more of them, or another split")
        self._conversations = conversations
        self._packing = packing
        self._num_samples = num_samples
        self._order = lru_cache(maxsize=2)(self._shuffled)  # of an epoch; a batch may lie in two
        self.seed = seed

    def _shuffled(self, epoch: int) -> Ints:
        return np.random.RandomState([self.seed, epoch]).permutation(len(self._packing))

    def conversations_of(self, k: int) -> Ints:
        """The numbers of the conversations in row k."""
        if not 0 <= k < self._num_samples:
            raise IndexError(f"sample {k} of {self._num_samples}")
        epoch, place = divmod(k, len(self._packing))
        return self._packing.row(self._order(epoch)[place])

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

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        """See `Samples`."""
        return self._conversations.text, self.conversations_of(k).tolist()
