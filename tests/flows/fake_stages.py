"""Stand-ins for the stages: they publish real artifacts through the real runtime, in milliseconds.

As a script (`fake_stages.py SPEC.json`) it is a stage process of its own. What it should do is read from the environment of
the *launcher*, or from files in the workspace: `<workspace>/fake/<node>` holds `fail`, `gate`, `bad`, `leak`, `kill` or
`hang`, which it does until something else stands there, and then that; so does `hang and save`, which saves as long once it
is asked to end.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Caller, Progress, StageFailed, StageJob
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.indexed_dataset import IndexWriter
from megatron_core_impl.data.streams import bin_path
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.process import ExitCode
from stages.contracts.specs import SOURCES, SPECS, Spec
from stages.outcomes import BadInput, GateFailed, Interrupted

_CONFIG = ModelConfig(
    family="llama", vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
)  # fmt: skip
MODEL = a.ModelFacts(**vars(_CONFIG), dtype="float32", parameters=1234)
TOKENIZER = a.TokenizerFacts(kind="sentencepiece", vocab_size=64, eod_id=2, bos_id=1, fingerprint="f" * 64)
WEIGHTS: dict[str, Any] = {"model": MODEL, "tp": 1, "pp": 1, "tensors": 3, "bytes": 64}
MAKES: dict[str, tuple[type[a.Artifact], dict[str, Any]]] = {
    "download-model": (a.ModelArtifact, {"model": MODEL, "tokenizer_files": (), "source": "m", "revision": None}),
    "download-data": (a.RawDataArtifact, {"documents": 3, "source": "d", "revision": None, "text_bytes": 9, "sets": ()}),
    "preprocess": (a.DatasetArtifact, {"tokenizer": TOKENIZER, "dtype": "uint16", "documents": 64, "empty_documents": 0,
                                       "malformed_lines": 0, "tokens": 4096, "bos_eos": "eos", "content": "text",
                                       "sets": ({"name": "data", "role": "all", "documents": 64, "tokens": 4096,
                                                 "empty_documents": 0, "malformed_lines": 0, "blank_lines": 0,
                                                 "longest": 64, "lengths": {}, "left_out": {}},)}),
    "convert": (a.WeightsArtifact, WEIGHTS),
    "verify": (a.VerificationArtifact, {"mean_error": 1e-7, "max_error": 1e-6, "loss_difference": 0.0,
                                        "argmax_agreement": 1.0, "allowed_mean_error": 1e-4, "precision": "fp32"}),
    "shard": (a.WeightsArtifact, WEIGHTS),
    "train": (a.CheckpointArtifact, {"model": MODEL, "tokenizer": TOKENIZER, "checkpoint": "checkpoints/step-000002",
                                     "step": 2, "consumed_samples": 16, "consumed_tokens": 256, "tp": 1, "pp": 1, "dp": 1,
                                     "loss_before": 8.32, "loss_after": 3.11}),
    "merge": (a.WeightsArtifact, WEIGHTS),
    "export": (a.ExportArtifact, {"model": MODEL, "loss_before": 8.32, "loss_after": 3.11, "mean_error": 1e-7,
                                  "source": "m", "source_revision": None}),
    "push": (a.PushArtifact, {"to": "dry-run", "target": "nowhere"}),
}  # fmt: skip


def config(workspace: Path, **train: Any) -> PipelineConfig:
    """A small configuration whose sources are Hub ids, so that nothing on this disk matters."""
    return PipelineConfig.model_validate(
        {
            "workspace": str(workspace),
            "model": {"source": "somebody/model"},
            "data": {"source": "somebody/data"},
            "train": {"steps": 2, "sequence_length": 16, **train},
        }
    )


def changed(workspace: Path, **sections: Any) -> PipelineConfig:
    """The same with other sections."""
    return PipelineConfig.model_validate(config(workspace).model_dump(mode="json") | sections)


def fake_run(spec: Spec, ctx: Context) -> a.Artifact:
    """Do what a stage of this node does, in small. What it writes follows from the spec, as in the real ones."""
    (ctx.scratch / "content.txt").write_text(f"{spec.NODE} {spec.key}\n")
    for name, kind in spec.INPUTS.items():
        ctx.input(name, kind)
    kind, facts = MAKES[spec.NODE]
    if spec.NODE == "preprocess":
        _write_dataset(ctx.scratch / "data", documents=64, of_tokens=64)
    metrics = (
        {"samples": [{"prompt": "def read(", "before": "??", "after": "self, size=-1):"}]} if spec.NODE == "export" else {}
    )
    return ctx.artifact(kind, figure=f"{spec.NODE} made", metrics=metrics, **facts)


def _write_dataset(prefix: Path, *, documents: int, of_tokens: int) -> None:
    np.zeros(documents * of_tokens, np.uint16).tofile(bin_path(prefix))
    with IndexWriter(prefix, np.dtype(np.uint16), documents, documents + 1) as index:
        index.add_sizes(np.full(documents, of_tokens, np.int32))
        index.add_doc_idx(np.arange(1, documents + 1))


def make_results(asked: PipelineConfig, until: str = "push") -> dict[str, a.Artifact]:
    """Make the result of every node, in this process, up to one."""
    made: dict[str, a.Artifact] = {}
    for node, spec in SPECS.items():
        inputs = {name: made[source] for name, source in SOURCES[node].items()}
        made[node] = runtime.execute(spec.of(asked, **inputs), fake_run)
        if node == until:
            break
    return made


def read_spec(file: Path) -> Spec:
    """The spec in a file named after its node."""
    return SPECS[file.stem].model_validate(json.loads(file.read_text()))


class InProcess:
    """A launcher that does the fake work in the calling thread, fails on demand, and counts."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: dict[str, StageFailed] = {}
        self.before: Callable[[str], object] = lambda node: None  # called when a node has told its progress

    def fail(self, node: str, message: str) -> None:
        """Make a node fail from now on."""
        self.failing[node] = StageFailed(node, "gate failed", message, log_file=Path("x.log"), code=ExitCode.GATE_FAILED)

    def run(self, job: StageJob, caller: Caller) -> None:
        self.ran.append(job.node)
        caller.on_line(f"this is {job.node}")
        caller.on_progress(Progress(1, 2, "half way"))
        self.before(job.node)
        if job.node in self.failing:
            raise self.failing[job.node]
        runtime.execute(read_spec(job.spec_file), fake_run, resumable=job.node == "train")


class Script(ProcessLauncher):
    """The process launcher with this file as every stage."""

    def command(self, job: StageJob) -> list[str]:
        return [sys.executable, __file__, str(job.spec_file)]


def _wait_while(wish: Path, todo: str) -> None:
    while wish.read_text().strip() == todo:
        time.sleep(0.02)  # a file tells nobody that it changed


def _as_stage(spec_file: Path) -> None:
    node = spec_file.stem
    spec = read_spec(spec_file)
    wish = Path(spec.workspace) / "fake" / node
    todo = wish.read_text().strip() if wish.exists() else ""

    def run(spec: Spec, ctx: Context) -> a.Artifact:
        nonlocal todo
        (Path(spec.workspace) / f"{node}.pid").write_text(str(os.getpid()))
        ctx.log(f"this is {node}, token {os.environ.get('HF_TOKEN', 'unset')}")
        ctx.progress(1, 2, "half way")
        if todo.startswith("hang"):
            hangs = Path(spec.workspace) / f"{node}.hangs"
            hangs.write_text(str(os.getpid()))
            try:
                _wait_while(wish, todo)
            except Interrupted:
                if todo == "hang and save":
                    hangs.with_suffix(".saves").touch()
                    _wait_while(wish, todo)
                    hangs.with_suffix(".saved").touch()
                raise
            hangs.unlink()
            todo = wish.read_text().strip()
        if todo == "gate":
            raise GateFailed("gate failed at layer 1")
        if todo == "bad":
            raise BadInput("the Hub refuses (403)")
        if todo == "fail":
            raise RuntimeError("a defect")
        if todo == "leak":
            raise RuntimeError(f"https://me:{os.environ['HF_TOKEN']}@hub refuses")
        if todo == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return fake_run(spec, ctx)

    sys.argv = [sys.argv[0], str(spec_file)]
    runtime.main(node, run, "A stand-in.", resumable=node == "train")


if __name__ == "__main__":
    _as_stage(Path(sys.argv[1]))
