"""Conversations on disk for tests: the files that preprocessing writes, from lists of ids and roles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from indexed_writer import IndexedDatasetWriter

from megatron_core_impl.data.streams import ROLE, TEXT, WEIGHT


def write(
    prefix: Path,
    texts: Sequence[Sequence[int]],
    roles: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
) -> Path:
    """Write a set and return its prefix."""
    streams = {TEXT: (texts, np.uint16), ROLE: (roles, np.uint16)} | ({WEIGHT: (weights, np.float64)} if weights else {})
    for suffix, (documents, dtype) in streams.items():
        with IndexedDatasetWriter(f"{prefix}{suffix}", dtype) as writer:
            for document in documents:
                writer.add_sequence(np.array(document, dtype))
    return prefix


def write_random(prefix: Path, sizes: Sequence[int], vocab_size: int) -> Path:
    """A set of random ids: a question, then an answer, of half of the tokens each."""
    random = np.random.RandomState(0)
    texts = [random.randint(0, vocab_size, size).tolist() for size in sizes]
    roles = [[1] * (size // 2) + [2] * (size - size // 2) for size in sizes]
    return write(prefix, texts, roles)
