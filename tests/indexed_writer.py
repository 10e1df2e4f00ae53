"""Writes small datasets for tests, of any layout that the format has: documents of several sequences, or none at all."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import IndexWriter
from megatron_core_impl.data.streams import bin_path


class IndexedDatasetWriter:
    """Keeps everything in memory until the context ends."""

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self.sequences: list[npt.NDArray[Any]] = []
        self.ends: list[int] = []  # sequences up to the end of each document

    def add_sequence(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence to the document that is open."""
        self.sequences.append(np.asarray(tokens).reshape(-1).astype(self.dtype))

    def end_document(self) -> None:
        """End a document: the sequences since the last end are one."""
        self.ends.append(len(self.sequences))

    def add_documents(self, tokens: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> None:
        """Append documents of one sequence each: their tokens one after another, and how many each has."""
        for sequence in np.split(tokens, np.cumsum(sizes)[:-1]):
            self.add_sequence(sequence)
            self.end_document()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        np.concatenate([np.empty(0, self.dtype), *self.sequences]).tofile(bin_path(self.prefix))
        with IndexWriter(self.prefix, self.dtype, len(self.sequences), len(self.ends) + 1) as index:
            index.add_sizes(np.array([len(sequence) for sequence in self.sequences], np.int32))
            index.add_doc_idx(np.array(self.ends, np.int64))
