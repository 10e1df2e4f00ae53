"""The page of a stage that is done: what it did, from what, in how long, and what came of it."""

from pathlib import Path
from typing import Any

from flows.show.pages import details
from flows.show.pages.markdown import code, digest, facts, page, table, text
from stages.contracts import artifacts as a
from stages.contracts.figures import file_rows, told_versions
from stages.contracts.specs import SOURCES
from stages.contracts.words import count, seconds

MOST_FILES = 12  # rows of the table of files; the rest is one line


def stage_page(node: str, artifact: a.Artifact, workspace: Path, *, cached: bool) -> str:
    """Markdown about the result of a node. Its figure is the line that Prefect shows above a page."""
    took = seconds(artifact.wall_seconds)
    how = f"Cached: this result was there and is intact. It took {took} to make." if cached else f"Ran in {took}, exit code 0."
    blocks = details.blocks_of(artifact, workspace)
    return page(
        f"## {node}\n\n{how}",
        *blocks,
        "" if blocks else facts(_plain_values(artifact.facts()) + _plain_values(artifact.metrics)),
        "### Inputs\n\n" + _inputs(node, artifact) if artifact.inputs else "",
        "### Outputs\n\n" + _files(artifact),
        "### Settings\n\n" + settings if (settings := _settings(artifact)) else "",
        "### About this result\n\n"
        + facts([
            ("folder", code(artifact.path)),
            ("fingerprint", digest(artifact.fingerprint)),
            ("key", code(artifact.key)),
            ("made", text(f"{artifact.created}, in {took}")),
            ("by", text(told_versions([artifact]))),
        ]),
    )  # fmt: skip


def _inputs(node: str, artifact: a.Artifact) -> str:
    refs = artifact.spec.get("inputs", {})
    rows = [
        (text(name), text(SOURCES[node].get(name, "")), code(refs.get(name, {}).get("path", "")), digest(fingerprint))
        for name, fingerprint in artifact.inputs.items()
    ]
    return table(("input", "made by", "folder", "fingerprint"), rows)


def _files(artifact: a.Artifact) -> str:
    total, rows = file_rows(artifact, MOST_FILES)
    shown = [(code(name), size, digest(blake3)) for name, size, blake3 in rows]
    return f"{total}. Digests are BLAKE3.\n\n" + table(("file", "size", "digest"), shown)


def _settings(artifact: a.Artifact) -> str:
    settings = {name: value for name, value in artifact.spec.items() if name != "inputs"}
    settings |= settings.pop("settings", {})  # they have a section of their own in the specs of some stages
    rows = [(name, code(value)) for name, value in _flat(settings) if value not in (None, "", [], {})]
    return facts(rows) if rows else ""


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _plain_values(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Those that are one value, for a table."""
    shown = {name: value for name, value in values.items() if isinstance(value, str | int | float) and name != "kind"}
    return [
        (name.replace("_", " "), ("yes" if value else "no") if isinstance(value, bool) else _value(value))
        for name, value in shown.items()
    ]


def _value(value: str | float) -> str:
    return code(value) if isinstance(value, str) else count(value) if isinstance(value, int) else f"{value:.4g}"
