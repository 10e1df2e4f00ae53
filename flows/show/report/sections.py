"""What the report says, section by section, as plain values that its template only has to put in place."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from flows.records.story import Story, last_lines, right_answers, told_memory
from flows.show.charts import Bar, Series, bars, curves
from flows.show.pictures import histogram, loss_chart
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.figures import (
    EVALUATION,
    GATES,
    MODULES,
    evaluation_rows,
    file_rows,
    filled,
    gate_rows,
    module_rows,
    perplexity,
    told_versions,
)
from stages.contracts.specs import SOURCES, refused_of
from stages.contracts.training_curves import Points
from stages.contracts.words import count, seconds, short

CHART = {"width": 400, "height": 230}  # small enough for a phone to show its words, and two beside each other elsewhere
MOST_FILES = 200  # of a result
COLOURS = {"ran": "d", "failed": "b", "stopped": "c"}


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""
    note: str = ""
    words: str = ""  # about it, where only its title shows
    anchor: str = ""

    @property
    def is_long(self) -> bool:
        return len(self.rows) > 16


# ── What it came to ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tiles(story: Story) -> list[tuple[str, str]]:
    """The figures that matter, each with its name."""
    found: list[tuple[str, str | None]] = []
    if (losses := story.losses()) is not None:
        before, after = losses
        found += [
            ("held-out loss", f"{before:.2f} → {after:.2f}"),
            ("perplexity", f"{perplexity(before)} → {perplexity(after)}"),
        ]
    elif story.curves is not None:
        found += [("loss", _so_far(story.curves.loss)), ("held-out loss", _so_far(story.curves.held_out))]
    if (export := story.of("export", a.ExportArtifact)) is not None and (right := right_answers(export)):
        found.append(("right answers", right.split(" of ")[0]))
    if (checkpoint := story.of("train", a.CheckpointArtifact)) is not None:
        found.append(("trained on", f"{short(checkpoint.consumed_tokens)} tokens"))
        speed = checkpoint.metrics.get("tokens_per_second")
        found.append(("tokens/s", f"{speed:,.0f}" if isinstance(speed, int | float) else None))
    found.append(("peak memory", told_memory(story.curves)))
    if (model := story.of("download-model", a.ModelArtifact)) is not None:
        found.append(("parameters", short(model.model.parameters)))
    return [(name, value) for name, value in found if value]


def _so_far(points: Points) -> str | None:
    """From where to where a loss came in a training that is not done, and in which step."""
    known = [(step, value) for step, value in points if value is not None]
    if not known:
        return None
    (_, first), (step, last) = known[0], known[-1]
    course = f"{first:.2f} → {last:.2f}" if len(known) > 1 else f"{first:.2f}"
    return f"{course}, step {count(step)}"


def failures(story: Story) -> list[tuple[str, str, str]]:
    """Of each node that failed: its name, why, the end of its log."""
    nodes = story.record.nodes
    return [(node, nodes[node].error or "", last_lines(story.folder.log(node))) for node in story.failed()]


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def charts(story: Story) -> list[str]:
    """Loss, learning rate, gradient norm and throughput by step, as SVG."""
    told = story.curves
    if told is None:
        return []
    drawn = [loss_chart(told, **CHART)]
    last = max(step for step, _ in [*told.loss, *told.held_out])  # all axes end there
    for title, points, colour in (
        ("learning rate", told.lr, "c"),
        ("gradient norm", told.grad_norm, "d"),
        ("tokens per second", told.tokens_per_second, "a"),
    ):
        drawn.append(curves([Series(title, points, colour)], title=title, last_x=last, **CHART))  # type: ignore[arg-type]
    return [chart for chart in drawn if chart is not None]


def evaluation(story: Story) -> Table | None:
    """What the model was worth before and after, and on the test split."""
    checkpoint = story.of("train", a.CheckpointArtifact)
    if checkpoint is None:
        return None
    return Table(*filled(EVALUATION, evaluation_rows(checkpoint, story.of("export", a.ExportArtifact))))


# ── Gates ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def gates(story: Story) -> list[Table]:
    """Of verify and export: what was judged, and the errors of every module."""
    tables = []
    for node, name, words in (
        ("verify", "verification.json", "Before training: the model that is trained, against transformers'"),
        ("export", "comparison.json", "After: the exported folder, loaded by transformers, against the trained model"),
    ):
        report = _json(_report(story, node, name))
        if not report:
            continue
        tables.append(Table(GATES, gate_rows(report), title=words))
        tables.append(Table(MODULES, module_rows(report), note="Errors by module"))
    return [table for table in tables if table.rows]


def _report(story: Story, node: str, name: str) -> Path | None:
    """The file of a gate's figures: in the result, or beside where it would be."""
    path = story.record.nodes[node].path
    if (file := story.file(node, name)) is not None or path is None:
        return file
    return refused_of(story.folder.workspace / path)


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def data(story: Story) -> tuple[Table, str | None] | None:
    """The sets of the tokenized data, and how long their documents are."""
    dataset = story.of("preprocess", a.DatasetArtifact)
    if dataset is None:
        return None
    rows = [
        (each.name, each.role, count(each.documents), count(each.tokens), count(each.longest), count(each.empty_documents),
         count(each.malformed_lines))
        for each in dataset.sets
    ]  # fmt: skip
    head = ("set", "for", "documents", "tokens", "longest", "empty", "malformed")
    return Table(head, rows), histogram(dataset, width=CHART["width"])


# ── Stages ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def timeline(story: Story) -> str | None:
    """When each stage ran, and for how long."""
    rows = []
    for node, state in story.record.nodes.items():
        if state.started is None or state.wall_seconds is None or state.state == "cached":
            continue
        begin = (state.started - story.record.started).total_seconds()
        took = state.wall_seconds
        rows.append(Bar(node, begin, begin + took, seconds(took), COLOURS.get(state.state, "a")))  # type: ignore[arg-type]
    return bars(rows, title="when each stage ran", width=CHART["width"])


def stages(story: Story) -> Table:
    """Every stage: how it ended, in how long, what it says of itself."""
    rows = []
    for node, state in story.record.nodes.items():
        took = seconds(state.wall_seconds) if state.wall_seconds is not None else ""
        if state.state == "cached" and node in story.artifacts:
            took = seconds(story.artifacts[node].wall_seconds)  # when it was made
        words = {"waiting": "not run"}.get(state.state, state.state)
        rows.append((node, words, took, (state.error or state.figure or "").partition("\n")[0]))
    return Table(("stage", "", "time", ""), rows)


def results(story: Story) -> list[Table]:
    """Every result: what it was made from, and its files with their digests."""
    tables = []
    for node, artifact in story.artifacts.items():
        sources = SOURCES[node]
        made_from = ", ".join(f"{sources.get(name, name)} {digest[:12]}" for name, digest in artifact.inputs.items())
        total, files = file_rows(artifact, MOST_FILES)
        rows = [(name, size, blake3[:32]) for name, size, blake3 in files]
        image = f" in the image {artifact.versions.image}" if artifact.versions.image else ""
        note = (
            f"{artifact.path}, fingerprint {artifact.fingerprint}. Made {artifact.created} in {seconds(artifact.wall_seconds)}"
            f"{image}{f', from {made_from}' if made_from else ''}."
        )
        words = f"{total}, fingerprint {artifact.fingerprint[:12]}"
        tables.append(Table(("file", "size", "BLAKE3"), rows, title=node, note=note, words=words, anchor=node))
    return tables


# ── Configuration ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def configuration(story: Story) -> tuple[str, str]:
    """The configuration as YAML: what was asked for, and with everything that is so by default."""
    asked = whole = story.record.config
    try:
        config = PipelineConfig.model_validate(whole)
        asked = config.model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        pass  # of another version
    return _yaml(asked), _yaml(whole)


def versions(story: Story) -> str:
    """What made the results."""
    return told_versions(story.artifacts.values())


def _yaml(value: Any) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def _json(file: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes()) if file is not None else {}
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}
