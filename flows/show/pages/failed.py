"""The page of a stage that failed: why, what it said last, and how to go on."""

from pathlib import Path

from flows.launch.protocol import StageFailed
from flows.records.run_record import NodeRecord
from flows.show.pages.details import of_card
from flows.show.pages.markdown import block, code, facts, page
from stages.contracts.words import seconds

LAST_LINES = 40  # of its log
LONGEST_TAIL = 200_000  # bytes of the log that are looked at


def failed_page(node: str, error: StageFailed, record: NodeRecord, workspace: Path) -> str:
    """Markdown about a stage that did not end well."""
    ended = "was stopped" if error.reason == "interrupted" else "failed"
    took = f" after {seconds(record.wall_seconds)}" if record.wall_seconds is not None else ""
    told = record.path and (workspace / record.path)
    return page(
        f"## {node} {ended}{took}",
        block(error.message),
        facts([
            ("reason", error.reason),
            ("exit code", str(error.code)),
            ("log", code(error.log_file)),
            ("go on", "Retry this run, or type " + code("finetune rerun RUN")),
        ]),
        of_card(told.parent / f".{told.name}.failed.md") if told else "",
        f"### The last lines of its log\n\n{block(tail)}" if (tail := last_lines(error.log_file)) else "",
    )  # fmt: skip


def last_lines(log: Path) -> str:
    """The end of a log, empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LONGEST_TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LAST_LINES:])
