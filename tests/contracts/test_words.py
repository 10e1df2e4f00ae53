"""Figures as people read them."""

import pytest

from stages.contracts import words


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0"), (950, "950"), (999, "999"), (1_000, "1 K"), (999_499, "999 K"), (999_600, "1 M"), (6_738_415_616, "6.74 B"),
        (999_600_000, "1 B"), (999_600_000_000, "1 T"),
    ],
)  # fmt: skip
def test_a_large_count_has_three_digits_and_its_unit(value: int, told: str) -> None:
    assert words.short(value) == told


def test_whole_percent_is_100_only_when_all_is_done() -> None:
    told = [words.whole_percent(share) for share in (0.0, 0.29, 0.57, 0.995, 0.9999, 1.0)]
    assert told == ["0%", "29%", "57%", "99%", "99%", "100%"]
