"""What is known of a run, for people: its record, the results of its nodes, what its training told on the way.

The terminal (`summary.py`), Prefect's UI (`pages/`) and the report (`report/`) tell the same story, each in its own form.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flows.records.run_record import FINISHED, NodeRecord, RunFolder, RunRecord
from stages.contracts import artifacts as a
from stages.contracts.figures import perplexity
from stages.contracts.specs import scratch_of
from stages.contracts.training_curves import Curves, curves_in
from stages.contracts.words import counted, seconds, size, whole_percent

A = TypeVar("A", bound=a.Artifact)

LAST_LINES = 40  # of a log
LONGEST_TAIL = 200_000  # bytes of it that are looked at
LONGEST_SAMPLE = 4_000  # characters
MOST_ANSWERS = 3  # of the questions that were asked, shown


class Sample(NamedTuple):
    """What the model wrote after a prompt, or a question, before and after training."""

    prompt: str
    before: str | None
    after: str | None
    wanted: str | None = None  # the answer that the data give

    def told(self) -> list[tuple[str, str]]:
        """What there is of it, each text with its name; of a long one the beginning."""
        texts = (("prompt", self.prompt), ("wanted", self.wanted), ("before", self.before), ("after", self.after))
        return [(name, text[:LONGEST_SAMPLE]) for name, text in texts if text is not None]


@dataclass(frozen=True)
class Story:
    """A run, as far as it went."""

    folder: RunFolder
    record: RunRecord
    artifacts: dict[str, a.Artifact]  # by node, of those that are done
    curves: Curves | None  # None: no training has told anything

    @property
    def is_done(self) -> bool:
        return self.record.state == "done"

    @property
    def took(self) -> str:
        """How long it took, up to its end."""
        return seconds(((self.record.finished or self.record.started) - self.record.started).total_seconds())

    def of(self, node: str, kind: type[A]) -> A | None:
        """The result of a node, if it is done."""
        artifact = self.artifacts.get(node)
        return artifact if isinstance(artifact, kind) else None

    def file(self, node: str, name: str) -> Path | None:
        """A file of a node's result, if it has it."""
        artifact = self.artifacts.get(node)
        return None if artifact is None or name not in artifact.files else artifact.folder(self.folder.workspace) / name

    def failed(self) -> Iterator[str]:
        """The nodes that failed."""
        return (node for node, state in self.record.nodes.items() if state.state == "failed")

    def losses(self) -> tuple[float, float] | None:
        """On held-out data before and after training."""
        checkpoint = self.of("train", a.CheckpointArtifact)
        return None if checkpoint is None else (checkpoint.loss_before, checkpoint.loss_after)

    def samples(self) -> list[Sample]:
        """What the model says, before and after training."""
        export = self.of("export", a.ExportArtifact)
        return [] if export is None else samples_of(export, export.folder(self.folder.workspace))

    def published(self) -> str | None:
        """Where the model was published: on the Hub, or in which folder, as all paths beside it from the root."""
        pushed = self.of("push", a.PushArtifact)
        if pushed is None or pushed.to == "dry-run":
            return None
        return str(Path(self.record.cwd) / pushed.target) if pushed.to == "folder" else pushed.target


def flow_of(record: RunRecord) -> str:
    """What a run is one of."""
    return "finetune-llama2" if record.stage is None else f"stage/{record.stage}"


def story_of(folder: RunFolder, record: RunRecord) -> Story:
    """All that is known of a run. What cannot be read is left out: a story never fails."""
    artifacts = {
        node: artifact
        for node, state in record.nodes.items()
        if state.state in FINISHED and (artifact := _artifact(folder.workspace, state.path)) is not None
    }
    return Story(folder, record, artifacts, _curves(folder.workspace, record.nodes["train"]))


def samples_of(export: a.ExportArtifact, folder: Path) -> list[Sample]:
    """Continuations of the configured prompts, then the first of the held-out questions that were asked."""
    found = _dicts(export.metrics.get("samples"))
    samples = [Sample(str(each.get("prompt", "")), _text(each.get("before")), _text(each.get("after"))) for each in found]
    try:
        asked = _dicts(json.loads((folder / "answers.json").read_bytes()))[:MOST_ANSWERS]
    except (OSError, ValueError):
        asked = []
    return samples + [
        Sample(str(each.get("question", "")), _text(each.get("before")), _text(each.get("after")), _text(each.get("answer")))
        for each in asked
    ]


def right_answers(export: a.ExportArtifact) -> str | None:
    """How many held-out questions were answered as the data answer them, if any were asked."""
    right = export.metrics.get("answers")
    try:
        return (
            f"{whole_percent(right['before'])} → {whole_percent(right['after'])} of "
            f"{counted(right['questions'], 'held-out question')}"
            if right
            else None
        )
    except (KeyError, TypeError, ValueError):
        return None


def last_lines(log: Path) -> str:
    """The end of a log, empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LONGEST_TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LAST_LINES:])


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _artifact(workspace: Path, path: str | None) -> a.Artifact | None:
    try:
        return None if path is None else a.load_artifact(workspace / path)
    except (a.DamagedArtifact, OSError):
        return None


def _curves(workspace: Path, train: NodeRecord) -> Curves | None:
    """Of the training's result; of one that is not done what it left: an older result may lie beside that, and is another's."""
    if train.path is None:
        return None
    folder = workspace / train.path
    return curves_in(folder if train.state in FINISHED else scratch_of(folder))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def told_memory(curves: Curves | None) -> str:
    """The most that a process of a training has held; empty where none has told."""
    return "" if curves is None or curves.memory is None else size(curves.memory)


def told_losses(before: float, after: float) -> str:
    """The figure that matters: did it help."""
    return f"held-out loss {before:.2f} → {after:.2f} · perplexity {perplexity(before)} → {perplexity(after)}"
