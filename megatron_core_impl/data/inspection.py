"""What is in a dataset: its statistics, and the text of a document. Only what is asked for is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_core_impl.data.indexed_dataset import BLOCK, IndexedDataset, Tokens
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.streams import bin_path
from megatron_core_impl.data.tokenizer import SentencePieceTokenizer, Tokenizer


@dataclass(frozen=True)
class Contents:
    """Statistics of a dataset. A document of several sequences counts as one; without doc_idx each sequence is one."""

    sequences: int
    documents: int
    empty: int  # of the documents
    tokens: int
    bytes: int  # of .bin
    dtype: str
    shortest: int  # tokens of a document
    longest: int
    mean: float
    lengths: dict[str, int]  # documents by length: "64" counts those of 64 … 127 tokens; the empty ones are not in it


def contents_of(prefix: Path | str) -> Contents:
    """Read a dataset's index.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged; the message names it.
    """
    dataset = IndexedDataset(prefix)
    seen, shortest = Statistics(), np.iinfo(np.int64).max
    for sizes in _document_sizes(dataset):
        seen.count_documents(sizes)
        seen.empty += int((sizes == 0).sum())
        shortest = min(shortest, int(sizes.min()))
    return Contents(
        sequences=len(dataset),
        documents=seen.documents,
        empty=seen.empty,
        tokens=seen.tokens,
        bytes=bin_path(prefix).stat().st_size,
        dtype=dataset.dtype.name,
        shortest=shortest if seen.documents else 0,
        longest=seen.longest,
        mean=seen.tokens / max(1, seen.documents),
        lengths=seen.histogram(),
    )


def statistics_of(dataset: IndexedDataset) -> Statistics:
    """The same counts as those of documents that are tokenized here, where the empty ones are counted apart."""
    seen = Statistics()
    for sizes in _document_sizes(dataset):
        seen.count_documents(sizes[sizes > 0])
        seen.empty += int((sizes == 0).sum())
    seen.rows = seen.documents + seen.empty
    return seen


def document_tokens(prefix: Path | str, number: int) -> Tokens:
    """The tokens of a document; they are counted from 0.

    Raises:
        FileNotFoundError: one of the dataset's two files is missing.
        ValueError: a file is damaged, or there is no such document.
    """
    dataset = IndexedDataset(prefix)
    count = _count_documents(dataset)
    if not 0 <= number < count:
        legal = f"it has {count:,}: 0 to {count - 1:,}" if count else "it has none"
        raise ValueError(f"{prefix}: there is no document {number:,}; {legal}")
    begin, end = dataset.doc_idx[number : number + 2] if len(dataset.doc_idx) > 1 else (number, number + 1)
    sequences = [dataset[i] for i in range(int(begin), int(end))]
    return np.concatenate(sequences) if sequences else np.empty(0, dataset.dtype)


def document_text(prefix: Path | str, number: int, tokenizer: Tokenizer) -> str:
    """The text of a document, control tokens written out.

    Raises:
        FileNotFoundError: one of the dataset's two files is missing.
        ValueError: a file is damaged, there is no such document, or it holds ids that the tokenizer does not have.
    """
    tokens = document_tokens(prefix, number)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"{prefix}: document {number:,} has ids {tokens.min():,} to {tokens.max():,}, the tokenizer has "
            f"{tokenizer.vocab_size:,}: it is not the one that the dataset was made with"
        )
    ids = tokens.tolist()
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.decode(ids)
    names = {number: token for token, number in tokenizer.control_tokens.items()}  # to the library they have no text
    runs = groupby(ids, names.__contains__)
    return "".join("".join(map(names.__getitem__, run)) if is_named else tokenizer.decode([*run]) for is_named, run in runs)


def _count_documents(dataset: IndexedDataset) -> int:
    """The reference's instruction data has no doc_idx: each sequence is a document."""
    return len(dataset.doc_idx) - 1 or len(dataset)


def _document_sizes(dataset: IndexedDataset) -> Iterator[Tokens]:
    """Tokens of each document, a block of documents at a time."""
    for start in range(0, _count_documents(dataset), BLOCK):
        if len(dataset.doc_idx) == 1:
            yield dataset.sizes[start : start + BLOCK]
            continue
        places = dataset.doc_idx[start : start + BLOCK + 1]  # sequence at which each begins, and the last one ends
        tokens = np.concatenate(([0], np.cumsum(dataset.sizes[places[0] : places[-1]], dtype=np.int64)))
        yield np.diff(tokens[places - places[0]])
