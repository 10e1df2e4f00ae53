"""The page of a stage that failed: why, what it said last, and how to go on."""

from flows.launch.protocol import StageFailed
from flows.records.go_on import ways_to_go_on
from flows.records.run_record import RunFolder, RunRecord
from flows.records.story import last_lines
from flows.show.pages.details import of_card
from flows.show.pages.markdown import block, code, facts, page
from stages.contracts.specs import refused_of
from stages.contracts.words import seconds


def failed_page(node: str, folder: RunFolder, record: RunRecord, error: BaseException | None) -> str:
    """Markdown about a node that did not end well.

    Args:
        error: what its task failed with; None: nobody saw it, its process is gone.
    """
    state = record.nodes[node]
    ended = "was stopped" if state.state == "stopped" else "failed"
    took = f" after {seconds(state.wall_seconds)}" if state.wall_seconds is not None else ""
    failed = error if isinstance(error, StageFailed) else None
    log = failed.log_file if failed is not None else folder.log(node)
    was_refused = failed is not None and failed.reason == "gate failed" and state.path is not None
    return page(
        f"## {node} {ended}{took}",
        block(state.error or ""),
        facts([
            *([("reason", failed.reason), ("exit code", str(failed.code))] if failed is not None else []),
            ("log", code(log)),
        ]),
        how_to_go_on(folder, record),
        of_card(refused_of(folder.workspace / str(state.path)).with_suffix(".md")) if was_refused else "",
        f"### The last lines of its log\n\n{block(tail)}" if (tail := last_lines(log)) else "",
    )  # fmt: skip


def how_to_go_on(folder: RunFolder, record: RunRecord) -> str:
    """What to do, as Markdown."""
    words, command = ways_to_go_on(folder, record)
    return f"{words}\n\n{block(command)}"
