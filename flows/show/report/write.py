"""Writing the report of a run, at its end, however it ended."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flows.records.go_on import ways_to_go_on
from flows.records.story import Story, flow_of
from flows.show.report import sections
from flows.show.report.lineage_graph import lineage_graph
from stages.contracts.words import lines

HERE = Path(__file__).parent


def write_report(story: Story) -> Path:
    """Write the report into the folder of a run, and return its path. A reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    file = story.folder.report
    draft = file.with_suffix(".html.new")
    draft.write_text(render(story), encoding="utf-8")
    draft.replace(file)
    return file


def render(story: Story) -> str:
    """The report as HTML. Every text in it is escaped by the template; what is drawn here is escaped where it is drawn."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    record = story.record
    asked, whole = sections.configuration(story)
    data, failures, results = sections.data(story), sections.failures(story), sections.results(story)
    told_of = {node for node, *_ in failures} | {result.anchor for result in results}
    fingerprints = {node: artifact.fingerprint for node, artifact in story.artifacts.items()}
    return templates.get_template("report.html.jinja").render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        record=record,
        flow=flow_of(record),
        took=story.took,
        tiles=sections.tiles(story),
        failures=failures,
        is_stopped=record.state == "stopped",  # on purpose: no failure
        go_on=None if story.is_done else ways_to_go_on(story.folder, record),
        charts=list(map(Markup, sections.charts(story))),
        evaluation=sections.evaluation(story),
        samples=[sample.told() for sample in story.samples()],
        lineage=Markup(lineage_graph(record.nodes, fingerprints, told_of)),
        timeline=Markup(sections.timeline(story) or ""),
        stages=sections.stages(story),
        gates=sections.gates(story),
        data=data[0] if data is not None else None,
        histogram=Markup(data[1] or "") if data is not None else "",
        results=results,
        asked=asked,
        whole=whole,
        versions=sections.versions(story),
        published=story.published(),
    )


def _printable(value: Any) -> Any:
    """What the template shows: of text that others may have written, no control characters."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else lines(value)
