"""Several datasets as one, by weight: in exactly the order of Megatron-LLM (golden fact G4).

Place i goes to the dataset that is furthest behind its share: the one with the largest `weight · max(i, 1) - taken`, the first
of equals, in float64. That is a recurrence over what was taken before, and a loop in Python takes a second for a few million
samples, so blocks of places are worked on side by side. What has been taken when a block begins is first guessed, by sharing
out exactly; where the end of a block is not what the next one began with, that one is done again from there. The rule forgets
quickly, so two rounds are the rule; and as the first block began right, what agrees in the end is what the loop would give.
"""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.samples import Row, Samples

MARGIN = 1.005  # how many more samples of each dataset are made than its share, as in the reference
BLOCK = 1024  # places

Ints = npt.NDArray[np.int64]


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1.

    Raises:
        ValueError: one of them is not above 0.
    """
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise ValueError(f"weight {bad[0]:g} of a dataset must be above 0; leave the dataset out instead")
    total = reduce(add, weights)  # one by one: newer Pythons' sum() rounds otherwise
    return [weight / total for weight in weights]


def samples_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples each dataset must have for `num_samples` of the blend."""
    return [math.ceil(num_samples * weight * MARGIN) for weight in normalized(weights)]


def blend_order(weights: Sequence[float], num_samples: int) -> npt.NDArray[np.int32]:
    """Which dataset gives each sample of the blend, [num_samples]. A dataset gives its own samples in order."""
    shares = np.array(normalized(weights))
    shares /= shares.sum()  # as the reference, which does so twice: it decides ties
    starts = np.arange(0, num_samples, BLOCK)
    taken = _shared_out(shares, starts)  # [blocks, datasets] when a block begins
    ends = np.empty_like(taken)  # and when it ends
    order = np.zeros((len(starts), BLOCK), np.int32)
    to_do = np.arange(len(starts))
    while len(to_do):
        now, rows = taken[to_do], np.arange(len(to_do))
        for place in range(min(BLOCK, num_samples)):
            behind = shares * np.maximum(starts[to_do] + place, 1)[:, None] - now
            order[to_do, place] = chosen = behind.argmax(axis=1)
            now[rows, chosen] += 1
        ends[to_do] = now
        to_do = 1 + np.flatnonzero((ends[:-1] != taken[1:]).any(axis=1))
        taken[to_do] = ends[to_do - 1]
    return order.reshape(-1)[:num_samples]


def _shared_out(shares: npt.NDArray[np.float64], places: Ints) -> Ints:
    """Whole numbers near the shares of so many places that sum to them: the largest remainders are rounded up."""
    exact = shares * places[:, None]
    whole = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(whole - exact, axis=1, kind="stable"), axis=1)
    left: Ints = places - whole.sum(axis=1)
    whole[rank < left[:, None]] += 1
    return whole


def rank_in_own(order: npt.NDArray[np.int32]) -> Ints:
    """The number of each place among those of the same dataset: 0 0 1 2 1 … of 0 1 0 0 1 …"""
    numbers = np.empty(len(order), np.int64)
    for dataset in range(int(order.max(initial=-1)) + 1):
        own = np.flatnonzero(order == dataset)
        numbers[own] = np.arange(len(own))
    return numbers


class Blend:
    """Samples of several datasets by weight, as `Samples`. A dataset that has no more is passed over; none is repeated.

    Args:
        order: which part gives each sample, `blend_order`.
    """

    def __init__(self, parts: Sequence[Samples], order: npt.NDArray[np.int32]) -> None:
        self.parts = parts
        numbers = rank_in_own(order)
        is_there = numbers < np.array([len(part) for part in parts])[order]
        self.part, self.number = order[is_there], numbers[is_there]  # [samples]

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, k: int) -> Row:
        return self.parts[int(self.part[k])][int(self.number[k])]

    def length(self, k: int) -> int:
        return self.parts[int(self.part[k])].length(int(self.number[k]))

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        """See `Samples`."""
        return self.parts[int(self.part[k])].documents(int(self.number[k]))
