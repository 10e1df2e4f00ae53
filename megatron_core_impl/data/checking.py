"""Whether a dataset that was made elsewhere is what it is taken for: whole, in one piece, of the ids of a vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_core_impl.data.indexed_dataset import BLOCK, IndexedDataset, Tokens, dtype_for
from megatron_core_impl.data.streams import ROLE, WEIGHT, Streams, bin_path, idx_path


class Legal(NamedTuple):
    """What the values of a stream may be: from 0 to below a limit."""

    limit: float
    name: str  # of a value
    hint: str


LEGAL = {
    ROLE: Legal(3, "role", "known are 0 system, 1 prompter and 2 assistant"),
    WEIGHT: Legal(np.inf, "weight", "a weight is a number from 0 on"),
}


def check_dataset(
    streams: Streams, vocab_size: int, told: Callable[[int, int], None] = lambda done, total: None
) -> IndexedDataset:
    """Read a dataset from its beginning to its end, a block at a time.

    Args:
        told: how many tokens of all streams have been read, and how many there are.

    Returns:
        Its tokens.

    Raises:
        ValueError: a file is damaged, the streams do not belong together, the ids are not of a vocabulary of this size, or not
            in the type that goes with it. The message names what is wrong, and where.
    """
    datasets = [IndexedDataset(prefix) for prefix in streams.prefixes]
    first = datasets[0]
    if first.dtype != (expected := dtype_for(vocab_size)):
        raise ValueError(
            f"{first.prefix} holds {first.dtype.name}, but the ids of a tokenizer with {vocab_size:,} are kept as "
            f"{expected.name}: it was made with another one. Take the model of that one, or tokenize the text again"
        )
    for dataset in datasets:
        check_layout(dataset)
    check_lengths(datasets)
    done, total = 0, sum(len(dataset.tokens) for dataset in datasets)
    for suffix, dataset in zip(streams.suffixes, datasets, strict=True):
        if (suffix == WEIGHT) != (dataset.dtype.kind == "f"):
            raise ValueError(f"{dataset.prefix} holds {dataset.dtype.name}; weights are float64, all else are whole numbers")
        of_ids = Legal(vocab_size, "id", f"the tokenizer has vocab_size={vocab_size:,}: it is not the one this was made with")
        for checked in _check_values(dataset, LEGAL.get(suffix, of_ids)):
            done += checked
            told(done, total)
    return first


def check_layout(dataset: IndexedDataset) -> None:
    """Refuse a dataset whose sequences do not lie one behind the other, the last of them at the end of its .bin.

    Raises:
        ValueError: naming the file.
    """
    place = 0
    for start in range(0, len(dataset), BLOCK):
        ends = place + np.cumsum(dataset.sizes[start : start + BLOCK], dtype=np.int64) * dataset.dtype.itemsize
        begins = np.concatenate(([place], ends[:-1]))
        if not np.array_equal(begins, dataset.pointers[start : start + BLOCK]):
            raise ValueError(f"{idx_path(dataset.prefix)}: its sequences do not lie one behind the other in the .bin")
        place = int(ends[-1])
    size = bin_path(dataset.prefix).stat().st_size
    if place != size:
        raise ValueError(
            f"{bin_path(dataset.prefix)}: has {size:,} bytes, its sequences take {place:,}. Make the dataset again"
        )


def check_lengths(streams: Sequence[IndexedDataset]) -> None:
    """Refuse streams of conversations that do not belong together.

    Raises:
        ValueError: naming two of them.
    """
    first, *others = streams
    for other in others:
        if not np.array_equal(other.sizes, first.sizes):
            raise ValueError(f"{other.prefix} and {first.prefix} have conversations of other lengths. Make both again")


def count_unended(dataset: IndexedDataset, token: int) -> int:
    """How many documents end with another token than this; the empty ones do not count. For a dataset in one piece."""
    count = 0
    for start in range(0, len(dataset), BLOCK):
        sequences = np.arange(start, min(start + BLOCK, len(dataset)))
        if len(dataset.doc_idx) > 1:
            first, last = np.searchsorted(dataset.doc_idx[1:], [start, start + BLOCK], "right")
            documents = dataset.doc_idx[first : 1 + last]
            sequences = documents[1:][np.diff(documents) > 0] - 1
        sequences = sequences[dataset.sizes[sequences] > 0]
        ends = dataset.pointers[sequences] // dataset.dtype.itemsize + dataset.sizes[sequences] - 1
        count += int((dataset.tokens[ends] != token).sum())
    return count


def document_of(dataset: IndexedDataset, sequence: int) -> int:
    """The document that a sequence is part of. Without documents (doc_idx is [0]) each sequence is one."""
    return int(np.searchsorted(dataset.doc_idx[1:], sequence, "right")) if len(dataset.doc_idx) > 1 else sequence


def _check_values(dataset: IndexedDataset, legal: Legal) -> Iterator[int]:
    """How many were checked, block by block."""
    for start in range(0, len(dataset.tokens), BLOCK):
        block: Tokens = dataset.tokens[start : start + BLOCK]
        is_legal = (block >= 0) & (block < legal.limit)
        if not is_legal.all():
            place = int(is_legal.argmin())
            sequence = int(np.searchsorted(dataset.pointers, (start + place) * dataset.dtype.itemsize, "right")) - 1
            where = f"{dataset.prefix}: document {document_of(dataset, sequence):,}"
            raise ValueError(f"{where} has {legal.name} {block[place]:,}; {legal.hint}")
        yield len(block)
