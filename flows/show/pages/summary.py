"""The page of a whole run, made at its end: what it led to, what every stage did, and where the report is."""

from pathlib import Path

from flows.records.go_on import go_on
from flows.records.run_record import NodeRecord
from flows.records.story import Story, right_answers
from flows.show.display import brief
from flows.show.pages.details import loss_chart, of_samples, unbroken
from flows.show.pages.markdown import block, code, facts, page, picture, table, text
from stages.contracts import artifacts as a
from stages.contracts.words import seconds

MARKS = {
    "ran": "✓",
    "cached": "✓ cached",
    "failed": "✗ failed",
    "stopped": "■ stopped",
    "running": "running",
    "waiting": "not run",
}


def summary_page(story: Story, report: str) -> str:
    """Markdown about a run that has ended.

    Args:
        report: where the report is, as Markdown.
    """
    record = story.record
    took = seconds(((record.finished or record.started) - record.started).total_seconds())
    export, model = story.of("export", a.ExportArtifact), story.folder.path / "export" / "model"
    return page(
        f"## {text(record.name)}: {record.state}, {took}",
        block("\n".join(filter(None, [record.error]))) if record.error else "",
        facts([
            ("report", report),
            *(_of_model(export, model) if export is not None else ()),
            ("published", code(story.published() or "")),
            ("logs", code(story.folder.path / "logs")),
            ("go on", "" if story.is_done else "Retry this run, or type " + code(go_on(story.folder.workspace, record, ""))),
        ]),
        block(f'AutoModelForCausalLM.from_pretrained("{model}")') if export is not None else "",
        picture(loss_chart(story.curves) if story.curves is not None else None, "the loss by step"),
        table(("stage", "", "time", ""), [_row(node, state) for node, state in record.nodes.items()]),
        of_samples(story.samples()),
    )  # fmt: skip


def _of_model(export: a.ExportArtifact, model: Path) -> list[tuple[str, str]]:
    return [
        ("model", code(model)),
        ("right answers", text(right_answers(export) or "")),
    ]


def _row(node: str, state: NodeRecord) -> tuple[str, str, str, str]:
    took = seconds(state.wall_seconds) if state.wall_seconds is not None and state.state != "cached" else ""
    told = brief(state.error) if state.error else state.figure or ""
    name = node.replace("-", "\N{NON-BREAKING HYPHEN}")  # columns are narrow
    return name, MARKS[state.state].replace(" ", "\N{NO-BREAK SPACE}"), took, text(unbroken(told))
