"""The record of a training run: means, lines, curves."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_core_impl.metrics import Journal, Report, Sums, Window, downsample, duration, perplexity, read_metrics


def test_window_is_weighted() -> None:
    window = Window()
    window.add(loss=1.0, weight=0.1, tokens=10, read=20, seconds=1.0, is_skipped=False)
    window.add(loss=4.0, weight=0.3, tokens=10, read=60, seconds=3.0, is_skipped=False)
    window.add(loss=0.0, weight=0.0, tokens=0, read=0, seconds=0.0, is_skipped=False)
    window.add(loss=math.inf, weight=0.4, tokens=40, read=80, seconds=4.0, is_skipped=True)
    assert window.loss == pytest.approx(1.3 / 0.4)
    assert (window.tokens, window.tokens_per_second) == (60, 20), "those that count, and the speed of all that was read"
    assert (window.steps, window.skipped_steps) == (4, 1)
    assert math.isnan(Window().loss)


def test_journal_writes_and_talks(tmp_path: Path) -> None:
    lines: list[str] = []
    with Journal(tmp_path, Report(log=lines.append), steps=100, log_interval=2, resume_step=0) as journal:
        journal.evaluation(0, Sums(loss=10 * math.log(4098), weight=10, tokens=10, correct=1))
        for step in (1, 2):
            journal.step(
                step, loss=3.5, weight=0.5, tokens=20_000, read=24_100, seconds=1.0, waited=0.25, lr=3e-4, grad_norm=1.25,
                memory=2_000_000_000,
            )  # fmt: skip
    assert lines == [
        "step   0/100 · held-out loss 8.3183 · perplexity 4,098 · next token right 10.0%",
        "step   2/100 · loss 3.5000 · lr 3.00e-04 · grad norm 1.25 · 24,100 tokens/s · 1m 38s left",
    ]
    assert read_metrics(tmp_path)[1] == {
        "step": 2, "loss": 3.5, "lr": 3e-4, "grad_norm": 1.25, "tokens": 40_000, "tokens_read": 48_200, "seconds": 2.0,
        "tokens_per_second": 24_100.0, "seconds_left": 98.0, "skipped_steps": 0, "data_wait_share": 0.25,
        "memory": 2_000_000_000,
    }  # fmt: skip


def test_a_step_without_anything_to_learn(tmp_path: Path) -> None:
    """It has no loss, which is no nan to worry about."""
    lines: list[str] = []
    texts: list[str] = []
    report = Report(log=lines.append, progress=lambda done, total, text: texts.append(text))
    with Journal(tmp_path, report, steps=9, log_interval=1, resume_step=0) as journal:
        journal.step(1, loss=0.0, weight=0.0, tokens=0, read=8, seconds=1.0, lr=1.0, grad_norm=0.0)
        journal.step(2, loss=math.nan, weight=1.0, tokens=1, read=8, seconds=1.0, lr=1.0, grad_norm=math.nan)
    assert lines[0].startswith("step 1/9 · no loss, as no token counts · lr ")
    assert texts[0].startswith("step 1/9 · no loss, as no token counts · ")
    assert lines[1].startswith("step 2/9 · loss nan · lr ")
    assert read_metrics(tmp_path)[0]["loss"] is None


def test_going_on_drops_later_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"st')
    with Journal(tmp_path, Report(), steps=9, log_interval=1, resume_step=4):
        pass
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]
    with Journal(tmp_path, Report(), steps=9, log_interval=1, resume_step=0):
        pass
    assert read_metrics(tmp_path) == []


def test_journal_without_a_folder_is_silent(tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError(arguments)

    with Journal(None, Report(fail, fail, fail), steps=1, log_interval=1, resume_step=0) as journal:
        journal.step(1, loss=1.0, weight=1.0, tokens=1, read=1, seconds=1.0, lr=1.0, grad_norm=1.0)
        journal.evaluation(1, Sums(loss=1.0, weight=1.0, tokens=1))


def test_downsample_keeps_the_ends() -> None:
    points = [(step, float(step)) for step in range(1, 1001)]
    fewer = downsample(points, 200)
    assert len(fewer) == 200
    assert (fewer[0], fewer[-1]) == (points[0], points[-1])
    assert len({b[0] - a[0] for a, b in pairwise(fewer)}) <= 2, "evenly spaced"
    assert downsample(points[:7]) == points[:7]


@pytest.mark.parametrize(("seconds", "text"), [(0.3, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (192, "3m 12s"), (7500, "2h 05m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_perplexity_is_cut() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(1e9) == math.exp(20)
