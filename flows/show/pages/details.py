"""What a page says of one kind of result: of data their statistics, of a gate the errors, of training its curves."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.records.story import Sample, right_answers, samples_of, told_memory
from flows.show.pages.markdown import block, code, facts, picture, table, text
from flows.show.pictures import histogram, loss_chart
from stages.contracts import artifacts as a
from stages.contracts.figures import EVALUATION, evaluation_rows, filled
from stages.contracts.training_curves import curves_in
from stages.contracts.words import count, seconds, short

MOST_MALFORMED = 5  # lines that are named
LONGEST_CARD = 60_000  # characters of a table of errors: a model of 80 layers has 20,000


def blocks_of(artifact: a.Artifact, workspace: Path) -> list[str]:
    """Blocks of Markdown about a result; what cannot be read of its files is left out."""
    match artifact:
        case a.DatasetArtifact():
            return of_dataset(artifact, artifact.folder(workspace))
        case a.VerificationArtifact():
            return [of_card(artifact.folder(workspace) / "verification.md")]
        case a.CheckpointArtifact():
            return of_training(artifact, artifact.folder(workspace))
        case a.ExportArtifact():
            folder = artifact.folder(workspace)
            right = right_answers(artifact)
            asked = f"Right answers: {right}." if right else ""
            return [asked, of_samples(samples_of(artifact, folder)), of_card(folder / "comparison.md")]
    return []


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_dataset(artifact: a.DatasetArtifact, folder: Path) -> list[str]:
    """Documents, tokens, lengths, and what was left out."""
    rows = [
        (code(each.name), each.role, count(each.documents), count(each.tokens), f"{each.tokens / max(each.documents, 1):,.1f}",
         count(each.longest), _left_out(each))
        for each in artifact.sets
    ]  # fmt: skip
    head = ("set", "for", "documents", "tokens", "mean length", "longest", "left out")
    return [
        table(head, rows),
        picture(histogram(artifact), "how many documents have which length"),
        _malformed(folder / "malformed.jsonl"),
    ]


def _left_out(each: a.DatasetSet) -> str:
    reasons = {
        "empty": each.empty_documents,
        "malformed": each.malformed_lines,
        "blank lines": each.blank_lines,
        **each.left_out,
    }
    return text(", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number) or "nothing")


def _malformed(file: Path) -> str:
    """The first lines that could not be read, where there were some."""
    rows = []
    try:
        with file.open(encoding="utf-8") as lines:
            for line, _ in zip(lines, range(MOST_MALFORMED), strict=False):
                told = json.loads(line)
                rows.append((code(told.get("file", "")), code(told.get("line", "")), code(told.get("reason", ""))))
    except (OSError, ValueError, AttributeError):
        pass
    return "### Malformed lines, the first of them\n\n" + table(("file", "line", "reason"), rows) if rows else ""


# ── Gates ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_card(file: Path) -> str:
    """The errors of every layer, as the gate wrote them down for people. Its title is the page's."""
    try:
        card = file.read_text(encoding="utf-8", errors="replace")[:LONGEST_CARD]
    except OSError:
        return ""
    lines = [f"#{line}" if line.startswith("#") else line for line in card.splitlines() if not line.startswith("# ")]
    return unbroken("\n".join(lines))


def unbroken(markdown: str) -> str:
    """The same with numbers that a narrow column does not break: 1e-07, 99.9 %."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", markdown))


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_training(artifact: a.CheckpointArtifact, folder: Path) -> list[str]:
    """What it did for the loss, its curve, its pace."""
    told, figures = curves_in(folder), artifact.metrics
    return [
        picture(loss_chart(told), "the loss by step"),
        unbroken(table(*filled(EVALUATION, evaluation_rows(artifact)))),
        facts([
            ("steps", f"{count(artifact.step)}, {short(artifact.consumed_tokens)} tokens that count"),
            ("processes", f"dp {artifact.dp} × tp {artifact.tp} × pp {artifact.pp}"),
            ("throughput", _number(figures.get("tokens_per_second"), "{:,.0f} tokens/s")),
            ("peak memory", told_memory(told)),
            ("training", _seconds(figures.get("training_seconds"))),
            ("evaluations", _seconds(figures.get("evaluation_seconds"))),
            ("skipped steps", _number(figures.get("skipped_steps"), "{:,.0f}")),
        ]),
    ]  # fmt: skip


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _seconds(value: Any) -> str:
    return seconds(value) if isinstance(value, int | float) else ""


# ── The trained model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def of_samples(samples: Sequence[Sample]) -> str:
    """What the model says now, and said before."""
    blocks = [f"{word}\n\n{block(said)}" for sample in samples for word, said in sample.told()]
    return "\n\n".join(["### Samples", *blocks]) if blocks else ""
