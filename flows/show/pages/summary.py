"""The page of a whole run, made at its end: what it led to, what every stage did, and where the report is."""

from pathlib import Path

from flows.records.run_record import NodeRecord
from flows.records.story import Story, right_answers
from flows.show.pages.details import of_samples, unbroken
from flows.show.pages.failed import how_to_go_on
from flows.show.pages.markdown import block, code, facts, page, picture, table, text
from flows.show.pictures import loss_chart
from stages.contracts import artifacts as a
from stages.contracts.words import brief, seconds

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
    export, model = story.of("export", a.ExportArtifact), story.folder.path / "export" / "model"
    return page(
        f"## {text(record.name)}: {record.state}, {story.took}",
        block(record.error) if record.error else "",
        "" if story.is_done else how_to_go_on(story.folder, record),
        facts([
            ("report", report),
            *(_of_model(export, model) if export is not None else ()),
            ("published", code(story.published() or "")),
            ("logs", code(story.folder.path / "logs")),
        ]),
        block(f'AutoModelForCausalLM.from_pretrained("{model}")') if export is not None else "",
        picture(loss_chart(story.curves), "the loss by step"),
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
    return name, MARKS[state.state].replace(" ", "\N{NO-BREAK SPACE}"), took, unbroken(text(told))
