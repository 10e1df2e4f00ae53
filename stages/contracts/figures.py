"""Figures of results as rows of tables: the same ones in Prefect's UI, in a run's report, on the cards of gate and model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_core_impl import metrics
from stages.contracts import artifacts as a
from stages.contracts.words import count, counted, size

Row = tuple[str, ...]


def filled(head: Row, rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """A table without the columns that have nothing in them. The first, of names, stays."""
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    return tuple(head[k] for k in kept), [tuple(row[k] for k in kept) for row in rows]


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

EVALUATION = ("", "before", "after", "after, on test")  # the head of `evaluation_rows`


def perplexity(loss: float) -> str:
    """e^loss, as a person reads it."""
    value = metrics.perplexity(loss)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def evaluation_rows(checkpoint: a.CheckpointArtifact, export: a.ExportArtifact | None = None) -> list[Row]:
    """What the model was worth before and after training, on held-out data; and on the test split, where there is one.

    Args:
        export: tells of questions that were asked, if some were.
    """
    before, after, found = checkpoint.loss_before, checkpoint.loss_after, checkpoint.metrics
    test = found.get("loss_test")
    rows: list[Row] = [
        ("loss", f"{before:.4f}", f"{after:.4f}", "" if test is None else f"{test:.4f}"),
        ("perplexity", perplexity(before), perplexity(after), "" if test is None else perplexity(test)),
    ]
    for name, words in (("accuracy", "next token right"), ("instruct_accuracy", "next token of an answer right")):
        if found.get(f"{name}_after") is not None:
            rows.append((words, *(_share(found.get(f"{name}_{when}")) for when in ("before", "after", "test"))))
    right = export.metrics.get("answers") if export is not None else None
    if right and "questions" in right:
        asked = f"right answers to {counted(right['questions'], 'question')}"
        rows.append((asked, _share(right.get("before")), _share(right.get("after")), ""))
    return rows


def _share(value: Any) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, int | float) and math.isfinite(value) else ""


# ── Gates, from the reports that they write: verification.json, comparison.json ─────────────────────────────────────────────

GATES = ("", "value", "allowed", "")  # the head of `gate_rows`
MODULES = ("output of", "mean |Δ|", "largest", "relative")  # and of `module_rows`


def gate_rows(report: Mapping[str, Any]) -> list[Row]:
    """What was judged: of the data and of all, then of each probe.

    The best tokens of a probe are told, and judge nothing: there are too few of them for a share.
    """
    gates = report.get("gates", [])
    rows = [_gate_row(gate) for gate in gates if gate.get("probe") is None]
    agreement = next((gate["name"] for gate in gates if gate.get("at_least")), "")
    for probe in report.get("probes", []):
        name, tokens = probe["probe"], counted(probe["tokens"], "token")
        rows += [_gate_row(gate) for gate in gates if gate.get("probe") == name]
        rows.append((f"{agreement}, {name}", percent(probe["argmax_agreement"]), "", f"{tokens}, not judged"))
    return rows


def _gate_row(gate: Mapping[str, Any]) -> Row:
    value, allowed = gate["value"], gate["allowed"]
    return (
        f"{gate['name']}, {gate['probe']}" if gate.get("probe") else gate["name"],
        "not finite" if not _is_finite(value) else percent(value) if gate["at_least"] else f"{value:.2g}",
        f"at least {percent(allowed)}" if gate["at_least"] else tolerance(allowed),
        "passed" if gate["passed"] else "failed",
    )


def module_rows(report: Mapping[str, Any]) -> list[Row]:
    """The differences after each module, in the order in which they are computed."""
    modules = report.get("modules", [])
    return [(each["module"], *(error(each.get(key)) for key in ("mean", "max", "relative"))) for each in modules]


def error(value: Any) -> str:
    """A difference; empty where there is none."""
    return ("0" if value == 0 else f"{value:.1e}") if _is_finite(value) else ""


def percent(share: float | None) -> str:
    """A share as a person reads it; never rounded up to 100 %. Empty where there is none."""
    if share is None:
        return ""
    # 0.043 × 10000 comes out a little below 430. No share of fewer than 10^12 tokens is as near to 100 %.
    return f"{math.floor(share * 10000 + 1e-9) / 100:g} %" if math.isfinite(share) else "none"


def tolerance(value: float) -> str:
    """In as few digits as it needs, e.g. 1e-04."""
    text = f"{value:.0e}"
    return text if value and float(text) == value and value < 0.1 else f"{value:g}"


def _is_finite(value: Any) -> bool:  # JSON has null for what is not
    return isinstance(value, int | float) and math.isfinite(value)


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def length_rows(dataset: a.DatasetArtifact) -> list[tuple[str, int]]:
    """How many documents of all sets have how many tokens."""
    counts: dict[int, int] = {}
    for each in dataset.sets:
        for lower, number in each.lengths.items():
            counts[int(lower)] = counts.get(int(lower), 0) + number
    return [(f"{n:,} to {2 * n - 1:,}" if n > 1 else f"{n}", number) for n, number in sorted(counts.items())]


# ── Results ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_rows(artifact: a.Artifact, most: int) -> tuple[str, list[Row]]:
    """All files of a result in a line, and its largest with their sizes and digests."""
    files = sorted(artifact.files.items(), key=lambda item: -item[1].size)
    smaller = f", the {count(len(files) - most)} smallest left out here" if len(files) > most else ""
    total = f"{counted(len(files), 'file')}, {size(sum(record.size for _, record in files))}{smaller}"
    return total, [(name, size(record.size), record.blake3) for name, record in files[:most]]


def versions_of(made: Iterable[a.Artifact]) -> dict[str, str]:
    """What results were made with: each program with all of its versions."""
    found: dict[str, list[str]] = {}
    for by in (artifact.versions for artifact in made):
        programs = {"megatron-flows": by.package, "Python": by.python, "torch": by.torch, **by.libraries, "image": by.image}
        for name, version in programs.items():
            if version and version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items() if versions}


def told_versions(made: Iterable[a.Artifact]) -> str:
    """The same in a line."""
    return " · ".join(f"{name} {versions}" for name, versions in versions_of(made).items())
