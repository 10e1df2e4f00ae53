"""What a person reads at the end of a run: did it help, what does it say now, where is it, how to load it."""

import math
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flows.run_record import RunFolder, RunRecord
from stages.contracts import artifacts as a
from stages.contracts.words import plain

LONGEST_SAMPLE = 240  # characters of a continuation


def print_summary(record: RunRecord, folder: RunFolder, console: Console) -> None:
    """Losses before and after, samples, the model's folder and the line that loads it."""
    lines: list[Text] = []
    checkpoint, export = _artifact(folder, record, "train"), _artifact(folder, record, "export")
    if isinstance(checkpoint, a.CheckpointArtifact):
        before, after = checkpoint.loss_before, checkpoint.loss_after
        loss = f"held-out loss {before:.2f} → {after:.2f} · perplexity {_perplexity(before)} → {_perplexity(after)}"
        lines += [Text(loss, style="bold"), Text("")]
    if isinstance(export, a.ExportArtifact):
        lines += _samples(export)
        model = shown_path(folder.path / "export" / "model")
        lines += [
            Text("The model:  ").append(model, style="bold"),
            Text(f'Load it:    AutoModelForCausalLM.from_pretrained("{model}")'),
        ]
    pushed = _artifact(folder, record, "push")
    if isinstance(pushed, a.PushArtifact) and pushed.to != "dry-run":
        lines.append(Text(f"Published:  {plain(pushed.target)}"))
    lines.append(Text(f"Logs:       {shown_path(folder.path / 'logs')}"))
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _samples(export: a.ExportArtifact) -> list[Text]:
    samples = export.metrics.get("samples")
    lines: list[Text] = []
    for sample in samples if isinstance(samples, list) else []:
        if not isinstance(sample, dict):
            continue
        for word, style in (("before", "dim"), ("after", "")):
            if sample.get(word) is not None:
                text = _one_line(str(sample.get("prompt", ""))), _one_line(str(sample[word]))
                lines.append(Text(f"{word:<8} ").append(text[0], style="bold").append(text[1], style=style))
        lines.append(Text(""))
    return lines


def _one_line(text: str) -> str:
    shown = plain(text.replace("\n", "\\n").replace("\t", "\\t"))
    return shown if len(shown) <= LONGEST_SAMPLE else shown[:LONGEST_SAMPLE] + "…"


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _artifact(folder: RunFolder, record: RunRecord, node: str) -> a.Artifact | None:
    path = record.nodes[node].path
    if path is None or record.nodes[node].state not in ("ran", "cached"):
        return None
    try:
        return a.load_artifact(folder.workspace / path)
    except a.DamagedArtifact:
        return None


def shown_path(path: Path) -> str:
    """A path as a person here would type it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
