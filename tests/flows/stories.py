"""Runs to tell of: workspaces with the stand-ins' results, and records that say how it went."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fake_stages import config, make_results

from flows.records.run_record import NodeRecord, RunFolder, RunRecord, now
from flows.records.story import Story, story_of
from stages.contracts import artifacts as a
from stages.contracts.specs import SPECS

HOSTILE = "<script>alert(1)</script>|`*_&\"'\x1b[31m\u202e"

GATES = {
    "passed": True,
    "gates": [
        {"name": "mean |Δlogit|", "value": 5.7e-8, "allowed": 1e-4, "at_least": False, "probe": None, "passed": True},
        {"name": "argmax agreement", "value": 1.0, "allowed": 0.999, "at_least": True, "probe": None, "passed": True},
        {"name": "|Δloss|", "value": None, "allowed": 1e-4, "at_least": False, "probe": "padding", "passed": False},
    ],
    "probes": [{"probe": "padding", "argmax_agreement": 0.98765, "tokens": 48}],
    "modules": [{"module": f"model.layers.{n}.mlp", "mean": 1e-7, "max": 2e-7, "relative": 3e-7 * n} for n in range(30)],
}


def metrics_lines(steps: int = 40) -> list[dict[str, Any]]:
    """What a training writes."""
    lines: list[dict[str, Any]] = [{"step": 0, "valid_loss": 8.37, "eval_seconds": 1.0}]
    for step in range(10, steps + 1, 10):
        lines.append(
            {"step": step, "loss": 8.0 - 0.05 * step, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 24_100.0,
             "seconds_left": 98.0, "memory": 2_300_000_000}
        )  # fmt: skip
    lines.append({"step": steps, "valid_loss": 4.89, "eval_seconds": 1.0})
    return lines


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def done_run(workspace: Path, name: str = "brisk-otter") -> RunFolder:
    """A run that ended well, of stand-ins; its training has curves."""
    asked = config(workspace)
    made = make_results(asked)
    write_metrics(made["train"].folder(workspace), metrics_lines())
    record = RunRecord(
        name=name, config=asked.model_dump(mode="json"), cwd="/", pid=1, state="done",
        started=now() - timedelta(seconds=200), finished=now(),
    )  # fmt: skip
    for number, node in enumerate(SPECS):
        record.nodes[node] = NodeRecord(
            state="cached" if node == "convert" else "ran", key=made[node].key, path=made[node].path,
            started=record.started + timedelta(seconds=5 * number), wall_seconds=3.0 + number, figure=made[node].figure,
        )  # fmt: skip
    folder = RunFolder(workspace, name)
    (folder.path / "logs").mkdir(parents=True)
    folder.write(record)
    return folder


def told(folder: RunFolder) -> Story:
    """The story of a run."""
    record = folder.read()
    assert record is not None
    return story_of(folder, record)


def with_file(story: Story, node: str, name: str, content: str) -> Story:
    """The same, with a further file in a node's result."""
    artifact = story.artifacts[node]
    (artifact.folder(story.folder.workspace) / name).write_text(content)
    files = {**artifact.files, name: a.FileRecord(size=len(content), blake3="0" * 64)}
    return with_artifact(story, node, files=files)


def with_artifact(story: Story, node: str, **changes: Any) -> Story:
    """The same, with another result of a node."""
    return replace(story, artifacts={**story.artifacts, node: story.artifacts[node].model_copy(update=changes)})
