"""Foreign values in messages: as Python writes them where they are short, and never long or endless."""

import pytest

from megatron_core_impl.shown import shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"), (True, "True"), (3, "3"), (-2**70, str(-2**70)), (1.5, "1.5"), ("a", "'a'"), (b"a", "b'a'"),
        ([1, "a"], "[1, 'a']"), ((1,), "(1)"), ({"a": [1]}, "{'a': [1]}"), ([], "[]"),
        ("x" * 61, f"'{'x' * 60}'…"), (b"x" * 61, f"b'{'x' * 60}'…"),
        ([*range(9)], "[0, 1, 2, 3, … 5 more]"),
        ([[[1]]], "[[a list]]"), (object(), "a object"),
    ],
)  # fmt: skip
def test_values(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_values_that_have_no_end_in_a_message() -> None:
    value: object = "x" * 1000
    for _ in range(100):
        value = [value, {"a": value}, (value, value)]
    assert shown(value) == "[[a list, a dict, a tuple], {'a': a list}, (a list, a list)]"
    assert shown(1 << 10_000_000) == "a number of 10,000,001 bits"
