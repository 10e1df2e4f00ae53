"""What was seen while text was tokenized: counted by part, added up, and written into the artifact."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt


@dataclass
class Statistics:
    """Counts of records and of the documents made of them."""

    rows: int = 0  # lines, or rows of parquet; every one is a document (with several keys, several), or one of the next four
    blank: int = 0  # lines with nothing in them
    empty: int = 0  # records without tokens
    malformed: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    documents: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of the longest document
    lengths: Counter[int] = field(default_factory=Counter)  # documents of n … 2n-1 tokens, by n, a power of two

    def count_documents(self, sizes: npt.NDArray[np.integer[Any]]) -> None:
        """Count documents, given how many tokens each has."""
        self.documents += len(sizes)
        self.tokens += int(sizes.sum(dtype=np.int64))
        self.longest = max(self.longest, int(sizes.max(initial=0)))
        powers = np.bincount(np.frexp(sizes.astype(np.float64))[1])  # n … 2n-1 have the same exponent
        self.lengths.update({2 ** (power - 1): int(count) for power, count in enumerate(powers) if count and power})

    def add(self, other: "Statistics") -> None:
        """Count what another has counted."""
        for name in ("rows", "blank", "empty", "malformed", "documents", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out.update(other.left_out)
        self.longest = max(self.longest, other.longest)
        self.lengths.update(other.lengths)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"lengths": self.histogram(), "left_out": dict(sorted(self.left_out.items()))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        lengths = Counter({int(n): count for n, count in values["lengths"].items()})
        return cls(**(values | {"lengths": lengths, "left_out": Counter(values["left_out"])}))

    def histogram(self) -> dict[str, int]:
        """Documents by length, shortest first: {"64": 3} are 3 documents of 64 … 127 tokens."""
        return {str(n): self.lengths[n] for n in sorted(self.lengths)}
