"""What of a stage's output goes to Prefect's log: no more than its server's database likes."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.running import run_stage
from flows.running.quiet import _LogFile
from flows.running.run_stage import PrefectLog


def test_so_many_lines_a_second_and_the_rest_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1.0]
    monkeypatch.setattr(run_stage, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(run_stage, "get_run_logger", lambda: logging.getLogger("stage"))
    caplog.set_level(logging.INFO, "stage")
    log = PrefectLog(Path("train.log"))
    for number in range(23):
        log.line(f"line {number}")
    assert caplog.messages == [f"line {number}" for number in range(20)]
    clock[0] = 2.0
    log.line("x" * 5000)
    assert caplog.messages[20:] == ["… 3 more lines in train.log", "x" * 4000]
    for number in range(20):
        log.line(f"line {number}")
    log.end()
    assert caplog.messages[22:] == [*(f"line {number}" for number in range(19)), "… 1 more lines in train.log"]


def test_a_log_that_cannot_be_opened_is_not_worth_a_run(tmp_path: Path) -> None:
    log = _LogFile(tmp_path / "gone" / "prefect.log", delay=True)
    log.handle(logging.makeLogRecord({"msg": "a line"}))
    (tmp_path / "gone").mkdir()
    log.handle(logging.makeLogRecord({"msg": "another"}))
    log.close()
    assert (tmp_path / "gone" / "prefect.log").read_text() == "another\n"
