"""What the tests of push share: artifacts as the stages before would leave them, and the stage as a process."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from hub_server import HubServer
from safetensors.numpy import save

from megatron_core_impl.config import ModelConfig
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.config import PushSettings
from stages.contracts.specs import PushSpec, Ref, Spec

ROOT = Path(__file__).parents[2]
TOKEN, READ_TOKEN = "hf_writeSECRETwriteSECRET", "hf_readSECRETreadSECRET"
BASE_MODEL = "ba5e" * 16  # fingerprint
MODEL = a.ModelFacts(
    **vars(
        ModelConfig(
            family="llama", vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
        )
    ),
    dtype="float32", parameters=856,
)  # fmt: skip
TOKENIZER = a.TokenizerFacts(kind="sentencepiece", vocab_size=16, eod_id=2, bos_id=1, fingerprint="f" * 64)
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
WEIGHTS = save({"model.norm.weight": np.random.default_rng(0).random(300_000).astype(np.float32)})
FILES = {
    "config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS, "tokenizer.json": b"{}",
    "README.md": b"# The base model's card",
}  # fmt: skip
WITH_CHART = {*FILES, "assets/loss.png"}  # what is published of a training whose losses make a curve
CURVE: list[dict[str, Any]] = [
    {"step": 0, "valid_loss": 8.32},
    *({"step": step, "loss": 3 + 500 / (step + 100), "lr": 3e-4 * (1 - step / 201)} for step in range(1, 201)),
    {"step": 200, "valid_loss": 3.11},
]
REPORT = {
    "precision": "fp32", "tokens": 1024, "mean_error": 2.2e-7, "max_error": 1e-6, "loss_difference": 1e-8,
    "argmax_agreement": 1.0, "gates": [{"name": "mean |Δlogit|", "value": 2.2e-7, "allowed": 1e-4, "passed": True}],
    "modules": [{"module": "model.layers.0", "mean": 1e-9, "max": 3e-8, "relative": 2e-7}],
}  # fmt: skip


def publish(workspace: Path, kind: type[a.Artifact], files: dict[str, bytes], spec: dict[str, Any], **facts: Any) -> Ref:
    """An artifact, as the stage that makes it would leave it."""
    folder = workspace / kind.__name__
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    records = {n: a.FileRecord(size=len(c), blake3=blake3(c).hexdigest()) for n, c in files.items()}
    loaded = {"tokenizers": "0.22.1"} | (
        {"transformers": "5.3.0"} if kind in (a.ExportArtifact, a.VerificationArtifact) else {}
    )
    artifact = kind(
        stage="any", key="0", path=kind.__name__, files=records, fingerprint="", spec=spec, figure="", created="",
        inputs={"model": BASE_MODEL} if kind is a.ExportArtifact else {}, wall_seconds=0,
        versions=a.Versions(package="0.1.0", python="3.11.9", torch="2.13.0", libraries=loaded), **facts,
    )  # fmt: skip
    fingerprint = a.fingerprint_of(str(kind.model_fields["kind"].default), records, artifact.facts())
    artifact = artifact.model_copy(update={"fingerprint": fingerprint})
    (folder / a.ARTIFACT_FILE).write_text(artifact.model_dump_json())
    return Ref(path=kind.__name__, fingerprint=fingerprint)


def push_inputs(workspace: Path, files: dict[str, bytes] = FILES, *, curve: Sequence[dict[str, Any]] = ()) -> dict[str, Ref]:
    """The inputs of push, of a model of these files.

    Without a curve nothing is drawn, which takes longer than all else of a push.
    """
    train = {"settings": {"lr": 3e-4, "steps": 200, "schedule": "cosine", "log_interval": 10, "global_batch_size": 8,
                          "sequence_length": 1024}}  # fmt: skip
    source = {"source": "/home/ada/Lib", "format": "text", "text_column": "text"}
    lengths = {"8": 1000, "1024": 1211}
    export = {f"model/{name}": content for name, content in files.items()}
    lines = "".join(json.dumps(line) + "\n" for line in curve).encode()
    return {
        "export": publish(
            workspace, a.ExportArtifact, {**export, "samples.json": b"[]", "comparison.json": json.dumps(REPORT).encode()}, {},
            model=MODEL, loss_before=8.32, loss_after=3.11, mean_error=2.1e-7, license="llama2",
            source="meta-llama/Llama-2-7b-hf", source_revision="0123456789abcdef" * 2,
        ),
        "checkpoint": publish(
            workspace, a.CheckpointArtifact, {"metrics.jsonl": lines}, train, model=MODEL, tokenizer=TOKENIZER,
            checkpoint="checkpoints/step-000200", step=200, consumed_samples=1600, consumed_tokens=1_638_400, tp=2, pp=1, dp=1,
            loss_before=8.32, loss_after=3.11, metrics={"accuracy_before": 0.01, "accuracy_after": 0.42, "loss_test": 3.2},
        ),
        "dataset": publish(
            workspace, a.DatasetArtifact, {}, {"settings": {"tokenizer": "auto", "bos_eos": "eos", "workers": 16}},
            tokenizer=TOKENIZER, dtype="uint16", documents=2211, empty_documents=3, malformed_lines=0, tokens=9_480_112,
            bos_eos="eos", content="text",
            sets=(a.DatasetSet(name="data", role="all", documents=2211, tokens=9_480_112, empty_documents=3, malformed_lines=0,
                               blank_lines=0, longest=1999, lengths=lengths, left_out={}),),
        ),
        "data": publish(
            workspace, a.RawDataArtifact, {}, {"data": source}, documents=2214, source="Lib", revision=None,
            text_bytes=31_400_000,
            sets=(a.RawSet(name="data", role="all", files=("a.jsonl",), origins=("a.jsonl",), format="text",
                           text_columns=("text",), columns={}, source="Lib", documents=None, text_bytes=31_400_000),),
        ),
        "verification": publish(
            workspace, a.VerificationArtifact, {"verification.json": json.dumps(REPORT).encode()}, {}, mean_error=2.2e-7,
            max_error=1e-6, loss_difference=1e-8, argmax_agreement=1.0, allowed_mean_error=1e-4, precision="fp32",
        ),
    }  # fmt: skip


def push_spec(tmp_path: Path, inputs: dict[str, Ref], **settings: Any) -> PushSpec:
    return PushSpec(workspace=str(tmp_path / "ws"), inputs=inputs, settings=PushSettings(**settings))


WITHOUT_PAUSES = (
    "import runpy, sys, time; time.sleep = lambda seconds: None; runpy.run_module('stages.{}', run_name='__main__')"
)


def started(
    spec: Spec, hub: HubServer | None, token: str | None, *, stage: str = "push", xet: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """The stage as a process that can reach nothing but the test's Hub, and that does not pause before it tries again."""
    workspace = Path(spec.workspace)
    (workspace / "spec.json").write_text(spec.model_dump_json())
    environment = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(workspace.parent / "home"),
        "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(workspace.parent / "home"), "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(Path(tempfile.gettempdir()) / "matplotlib-of-tests"), **environment,
    }  # fmt: skip
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_PAUSES.format(stage), str(workspace / "spec.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=workspace.parent,
    )  # fmt: skip


def run(
    spec: Spec, hub: HubServer | None = None, token: str | None = None, *, stage: str = "push", xet: bool = False, **env: str
) -> tuple[int, str, str]:
    """Exit code and output of a stage that runs to its end."""
    with started(spec, hub, token, stage=stage, xet=xet, **env) as process:
        out, err = process.communicate(timeout=120)
    assert "SECRET" not in out + err, "the token is nobody's business"
    return process.returncode, out, err


def done(
    spec: PushSpec, hub: HubServer | None = None, token: str | None = None, *, xet: bool = False, **env: str
) -> a.PushArtifact:
    code, out, err = run(spec, hub, token, xet=xet, **env)
    assert code == 0, out + err
    artifact = intact.find_intact(spec.folder)
    assert isinstance(artifact, a.PushArtifact)
    return artifact


def refused(spec: PushSpec, hub: HubServer | None = None, token: str | None = None, *, code: int = 2, **env: str) -> str:
    """The error of a run that ends without a result: one line, no traceback."""
    got, out, err = run(spec, hub, token, **env)
    assert got == code, out + err
    assert "Traceback" not in err
    assert not spec.folder.exists()
    return err.strip().splitlines()[-1]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
