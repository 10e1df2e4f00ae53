"""A finished node's page in Prefect's UI: what went in, what came out, and the figures, as a table in Markdown."""

from typing import Any

from stages.contracts import artifacts as a
from stages.contracts.words import count, seconds, size

MOST_FILES = 12  # rows of the table of files; the rest is one line


def stage_page(node: str, artifact: a.Artifact, *, cached: bool) -> str:
    """Markdown about a node's result. Values come from files that others may have written: they are shown as code."""
    how = "cached: this result was there and is intact" if cached else f"ran in {seconds(artifact.wall_seconds)}"
    total = sum(record.size for record in artifact.files.values())
    blocks = [
        f"## {node}\n**{artifact.figure}**\n\n{how}",
        _table(("", ""), [
            ("result", artifact.path),
            ("key", artifact.key),
            ("fingerprint", artifact.fingerprint),
            ("made", f"{artifact.created}, in {seconds(artifact.wall_seconds)}"),
            ("by", _versions(artifact.versions)),
            ("files", f"{count(len(artifact.files))}, {size(total)}"),
        ]),
    ]  # fmt: skip
    if artifact.inputs:
        refs = artifact.spec.get("inputs", {})
        rows = [(name, refs.get(name, {}).get("path", ""), digest) for name, digest in artifact.inputs.items()]
        blocks.append("### Inputs\n" + _table(("input", "folder", "fingerprint"), rows))
    facts = [(k, v) for k, v in artifact.facts().items() if isinstance(v, str | int | float | bool)]
    figures = [(k, v) for k, v in artifact.metrics.items() if isinstance(v, str | int | float | bool)]
    if facts or figures:
        blocks.append("### Facts and figures\n" + _table(("", ""), facts + figures))
    files = sorted(artifact.files.items(), key=lambda item: -item[1].size)
    rows = [(name, size(record.size), record.blake3) for name, record in files[:MOST_FILES]]
    more = f"\n\nand {count(len(files) - MOST_FILES)} smaller ones" if len(files) > MOST_FILES else ""
    blocks.append("### Files\n" + _table(("file", "size", "BLAKE3"), rows) + more)
    settings = {k: v for k, v in artifact.spec.items() if k != "inputs"}
    if settings:
        blocks.append("### Settings\n" + _table(("", ""), list(_flat(settings))))
    return "\n\n".join(blocks) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join([str(row[0]), *map(_code, row[1:])]) + " |" for row in rows]
    return "\n".join(lines)


def _code(value: Any) -> str:
    text = str(value).replace("`", "'").replace("|", "¦").replace("\n", " ")
    return f"`{text[:200]}`" if text else ""


def _versions(versions: a.Versions) -> str:
    parts = [f"megatron-flows {versions.package}", f"Python {versions.python}"]
    libraries = {"torch": versions.torch, **versions.libraries}
    return ", ".join(parts + [f"{name} {version}" for name, version in libraries.items() if version])


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
