"""Blends: golden fact G4, the reference's loop as the oracle, and what becomes of parts that have too little."""

import math
from functools import reduce
from operator import add

import numpy as np
import pytest

from megatron_core_impl.data.blend import BLOCK, Blend, blend_order, rank_in_own, samples_of_each
from megatron_core_impl.data.samples import Row


def by_the_rule(weights: list[float], num_samples: int) -> list[int]:
    """The reference's helper: place after place, to whom is furthest behind, the first of equals."""
    total = reduce(add, weights)  # Python 3.12's sum rounds otherwise
    shares = np.array([weight / total for weight in weights])
    shares = (shares / shares.sum()).tolist()
    taken, order = [0] * len(weights), []
    for i in range(num_samples):
        behind = [share * max(float(i), 1.0) - own for share, own in zip(shares, taken, strict=True)]
        order.append(behind.index(max(behind)))
        taken[order[-1]] += 1
    return order


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.7, 0.3], [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]),
        ([1, 1], [0, 1, 0, 1, 0, 1, 0, 1]),
        ([5, 3, 2], [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]),
    ],
)
def test_order_is_the_reference_s(weights: list[float], expected: list[int]) -> None:
    assert blend_order(weights, len(expected)).tolist() == expected


def test_numbers_within_the_parts_are_the_reference_s() -> None:
    numbers = [0, 0, 1, 2, 1, 3, 4, 2, 5, 6, 7, 3, 8, 9, 4, 10, 11, 5, 12, 13]
    assert rank_in_own(blend_order([0.7, 0.3], 20)).tolist() == numbers


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3], [1, 1, 1], [1000, 1, 1], [0.6, 0.1, 0.1, 0.1, 0.1], [1e-9, 1], [3],
        [0.1, 0.2, 0.3], [0.1, 0.4, 0.1], [1 / 3, 1 / 7, 1 / 11],
        *(np.random.RandomState(seed).rand(2 + seed).tolist() for seed in range(6)),
    ],
    ids=lambda weights: f"{len(weights)} of {weights[0]:.2g}",
)  # fmt: skip
def test_order_is_that_of_the_loop_beyond_many_blocks(weights: list[float]) -> None:
    for num_samples in (1, BLOCK - 1, 9 * BLOCK + 7):
        assert blend_order(weights, num_samples).tolist() == by_the_rule(weights, num_samples)


def test_samples_of_each() -> None:
    found = [samples_of_each([3, 1], n) for n in (1000, 100, 10)]
    assert found == [[754, 252], [76, 26], [8, 3]]
    assert samples_of_each([0.7, 0.3], 100) == [71, 31]


def test_each_has_enough_for_its_share() -> None:
    random = np.random.RandomState(2)
    for _ in range(30):
        weights = random.rand(random.randint(1, 7)).tolist()
        n = int(random.randint(1, 3000))
        counts = np.bincount(blend_order(weights, n), minlength=len(weights))
        assert (counts <= samples_of_each(weights, n)).all()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight {weight:g} of a dataset must be above 0; leave the dataset out instead"):
        blend_order([1.0, weight], 10)


class Numbers:
    """Samples of one token that say whose they are."""

    def __init__(self, count: int, first: int) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Row:
        if k >= self.count:
            raise IndexError(k)
        return Row(np.array([self.first + k]), np.array([0]))

    def length(self, k: int) -> int:
        return self.first


def test_a_part_that_has_no_more_is_passed_over() -> None:
    blend = Blend([Numbers(3, 100), Numbers(100, 200)], blend_order([1, 1], 12))
    assert len(blend) == 9
    assert [int(blend[k].tokens[0]) for k in range(9)] == [100, 200, 101, 201, 102, 202, 203, 204, 205]
    assert [blend.length(k) for k in (0, 1)] == [100, 200]
