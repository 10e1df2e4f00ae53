"""Figures as rows of tables: the same ones wherever they are shown."""

import math

from stages.contracts import figures

GATE = {"name": "mean |Δlogit|", "value": 5.7e-8, "allowed": 1e-4, "at_least": False, "probe": None, "passed": True}


def test_gates_of_the_data_then_of_each_probe() -> None:
    report = {
        "gates": [
            {**GATE, "value": 2e-3, "passed": False, "probe": "padding"},
            GATE,
            {**GATE, "name": "argmax agreement", "value": 0.99999, "allowed": 0.999, "at_least": True},
        ],
        "probes": [{"probe": "padding", "argmax_agreement": None, "tokens": 1}],
    }
    assert figures.gate_rows(report) == [
        ("mean |Δlogit|", "5.7e-08", "1e-04", "passed"),
        ("argmax agreement", "99.99 %", "at least 99.9 %", "passed"),
        ("mean |Δlogit|, padding", "0.002", "1e-04", "failed"),
        ("argmax agreement, padding", "", "", "1 token, not judged"),
    ]
    assert figures.gate_rows({}) == []


def test_what_is_not_finite_is_said_before_and_after_json() -> None:
    """JSON has null for it."""
    for value in (math.nan, math.inf, None):
        for at_least in (False, True):
            [row] = figures.gate_rows({"gates": [{**GATE, "value": value, "at_least": at_least}]})
            assert row[1] == "not finite"
        assert figures.module_rows({"modules": [{"module": "norm", "mean": value, "max": 0.0, "relative": 2e-7}]}) == [
            ("norm", "", "0", "2.0e-07")
        ]


def test_a_share_is_cut_never_rounded_up() -> None:
    shares = (0.0, 0.043, 0.57, 0.98765, 0.99996, 1 - 1e-12, 1.0)
    assert [figures.percent(share) for share in shares] == ["0 %", "4.3 %", "57 %", "98.76 %", "99.99 %", "99.99 %", "100 %"]


def test_perplexity_and_columns_without_anything() -> None:
    assert [figures.perplexity(loss) for loss in (0.0, 3.11, 8.32, 1e9)] == ["1.00", "22.42", "4,105", "485,165,195"]
    rows = [("loss", "1", "", ""), ("perplexity", "2", "", "3")]
    assert figures.filled(("", "before", "after", "test"), rows) == (
        ("", "before", "test"),
        [("loss", "1", ""), ("perplexity", "2", "3")],
    )
