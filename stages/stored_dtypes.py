"""In which precisions a folder's weights really are stored, and how a person is told."""

from collections import Counter
from collections.abc import Iterable
from math import prod

from megatron_core_impl.checkpoint.source import WeightsSource


def other_dtypes(source: WeightsSource, names: Iterable[str], dtype: str) -> dict[str, int]:
    """How many numbers are stored otherwise than a model's facts say, by their dtype."""
    stored: Counter[str] = Counter()
    for name in names:
        stored[source.dtype(name).name] += prod(source.shape(name))
    del stored[dtype]
    return dict(sorted(stored.items()))


def listed(dtypes: dict[str, int]) -> str:
    """Some numbers by dtype, in words."""
    return " and ".join(f"{count:,} numbers in {name}" for name, count in dtypes.items())
