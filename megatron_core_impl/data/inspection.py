"""What is in a dataset: its statistics, and the text of a document. Only what is asked for is read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_core_impl.data.indexed_dataset import BLOCK, IndexedDataset, Tokens, bin_path
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Contents:
    """Statistics of a dataset. A document of several sequences counts as one; without doc_idx each sequence is one."""

    sequences: int
    documents: int
    tokens: int
    bytes: int  # of .bin
    dtype: str
    shortest: int  # tokens of a document
    longest: int
    mean: float
    lengths: dict[str, int]  # documents by length: "64" counts those of 64 … 127 tokens


def contents_of(prefix: Path | str) -> Contents:
    """Read a dataset's index.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged; the message names it.
    """
    dataset = IndexedDataset(prefix)
    seen, shortest = Statistics(), 0
    ends = document_ends(dataset)
    for start in range(0, len(ends), BLOCK):
        block = ends[start : start + BLOCK]
        begin = int(ends[start - 1]) if start else 0
        tokens = np.concatenate(([0], np.cumsum(dataset.sizes[begin : int(block[-1])], dtype=np.int64)))
        sizes = np.diff(tokens[block - begin], prepend=0)
        seen.count_documents(sizes)
        shortest = min(shortest, int(sizes.min())) if start else int(sizes.min())
    return Contents(
        sequences=len(dataset),
        documents=seen.documents,
        tokens=seen.tokens,
        bytes=bin_path(prefix).stat().st_size,
        dtype=dataset.dtype.name,
        shortest=shortest,
        longest=seen.longest,
        mean=seen.tokens / max(1, seen.documents),
        lengths=seen.histogram(),
    )


def document_tokens(prefix: Path | str, number: int) -> Tokens:
    """The tokens of a document; they are counted from 0.

    Raises:
        FileNotFoundError: one of the dataset's two files is missing.
        ValueError: a file is damaged, or there is no such document.
    """
    dataset = IndexedDataset(prefix)
    ends = document_ends(dataset)
    if not 0 <= number < len(ends):
        legal = f"it has {len(ends):,}: 0 to {len(ends) - 1:,}" if len(ends) else "it has none"
        raise ValueError(f"{prefix}: there is no document {number:,}; {legal}")
    begin = int(ends[number - 1]) if number else 0
    sequences = [dataset[i] for i in range(begin, int(ends[number]))]
    return np.concatenate(sequences) if sequences else np.empty(0, dataset.dtype)


def document_text(prefix: Path | str, number: int, tokenizer: Tokenizer) -> str:
    """The text of a document.

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
    return tokenizer.decode(tokens.tolist())


def document_ends(dataset: IndexedDataset) -> Tokens:
    """The sequence behind each document's last. The reference's instruction data has no doc_idx: each sequence is one."""
    return dataset.doc_idx[1:] if len(dataset.doc_idx) > 1 else np.arange(1, len(dataset) + 1)
