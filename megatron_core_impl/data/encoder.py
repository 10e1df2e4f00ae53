"""What turns records into tokens, as the engine of preprocessing sees it: plain text and conversations are two of them.

A recipe, a small frozen dataclass that can be sent to another process, says what to do; each worker process makes its encoder
from it, which loads the tokenizer. A chunk of records becomes one stream of tokens or several of the same length, say the ids
and the role of every token: each stream is a dataset of its own, `<name><suffix>.bin` and `.idx`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import Tokens
from megatron_core_impl.data.records import Record


@dataclass
class Encoded:
    """The documents of a chunk of records, in its order."""

    streams: dict[str, Tokens]  # by suffix ("" for text): the tokens of all documents, one after another
    sizes: npt.NDArray[np.int64]  # [documents] tokens of each, the same for all streams
    empty: int = 0  # records without tokens: left out, as by the reference
    malformed: list[tuple[int, str]] = field(default_factory=list)  # (index of the record, reason): left out
    left_out: Counter[str] = field(default_factory=Counter)  # records left out for other reasons, which are the keys


class Encoder(Protocol):
    """Makes documents of records, independently of each other, and always the same of the same."""

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Type of each stream's tokens, by suffix."""

    @property
    def ends_documents(self) -> bool:
        """Whether doc_idx counts documents (text), or stays [0], as in the reference's instruction data."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of a record that may be read; of a parquet file only these columns are."""

    @property
    def required(self) -> tuple[str, ...]:
        """Those of them without which no record can be encoded: a parquet file must have these columns."""

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Encode a chunk.

        Raises:
            ValueError: nothing that a record could be blamed for, such as an id that the type does not hold.
        """


class Recipe(Protocol):
    """Says how to encode. A frozen dataclass whose `repr` names everything that decides the result, so that finished parts of
    another recipe are never taken for its own."""

    def encoder(self) -> Encoder:
        """Make the encoder, in the process that is to use it."""
