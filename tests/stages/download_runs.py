"""Runs of the download stage for its tests: as a process, with a Hub on loopback; in this one where nothing is of the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import save

from stages import download, runtime
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.config import ModelSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, Spec
from stages.outcomes import BadInput

ROOT = Path(__file__).parents[2]
TOKEN = "hf_testsecretSECRETtestsecret"
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
WEIGHTS = {"model.embed_tokens.weight": np.ones((16, 8), np.float32), "model.norm.weight": np.arange(8, dtype=np.float16)}
CARD = "---\nlicense: other\nlicense_name: llama2\n---\n# A model\n"
MODEL = {
    "config.json": json.dumps(CONFIG), "model.safetensors": save(WEIGHTS), "tokenizer.json": "{}", "README.md": CARD,
    "tokenizer_config.json": '{"model_max_length": 64}', "generation_config.json": '{"a": 1}', "LICENSE.txt": "Be kind.",
    "pytorch_model.bin": b"\x80pickle", "training_args.bin": b"\x80pickle", "original/consolidated.00.pth": b"\x80pickle",
    "onnx/model.safetensors": save(WEIGHTS),
}  # fmt: skip
TAKEN = {
    "config.json", "model.safetensors", "tokenizer.json", "README.md", "tokenizer_config.json", "generation_config.json",
    "LICENSE.txt",
}  # fmt: skip


def model_spec(workspace: Path, source: object, **settings: Any) -> DownloadModelSpec:
    return DownloadModelSpec(workspace=str(workspace), model=ModelSettings(source=str(source), **settings))


def data_spec(workspace: Path, source: object, **settings: Any) -> DownloadDataSpec:
    return DownloadDataSpec(workspace=str(workspace), data=DataSettings(source=str(source), **settings))


def environment(spec: Spec, hub: HubServer | None, token: str | None) -> dict[str, str]:
    """What a stage gets: nothing of this machine's, and no way out but to the test's Hub."""
    settings = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(Path(spec.workspace).parent / "home"),
        "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return settings | ({"HF_TOKEN": token} if token else {})


def start(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> subprocess.Popen[str]:
    """The stage as a process."""
    workspace = Path(spec.workspace)
    workspace.mkdir(exist_ok=True)
    file = workspace / "spec.json"
    file.write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "stages.download", str(file)], text=True, cwd=workspace.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(spec, hub, token) | more,
    )  # fmt: skip


def run(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> tuple[int, str, str]:
    process = start(spec, hub, token, **more)
    out, err = process.communicate(timeout=120)
    assert TOKEN not in out + err, "the token is nobody's business"
    return process.returncode, out, err


def done(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> a.Artifact:
    """The artifact of a run that succeeds."""
    code, out, err = run(spec, hub, token, **more)
    assert code == 0, out + err
    return _checked(spec)


def _checked(spec: Spec) -> a.Artifact:
    for path in spec.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
        assert not path.is_symlink()
    artifact = a.load_artifact(spec.folder)
    intact.check_files(spec.folder, artifact, thorough=True)
    return artifact


def refused(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> str:
    """The error of a run that the person must mend: one line, no traceback, no half result."""
    code, out, err = run(spec, hub, token, **more)
    assert code == 2, out + err
    assert "Traceback" not in err
    _check_nothing_is_left(spec)
    return err.strip().splitlines()[-1]


def _check_nothing_is_left(spec: Spec) -> None:
    assert not spec.folder.exists()
    assert not list(spec.folder.parent.glob(".*.partial"))


def done_here(spec: DownloadModelSpec | DownloadDataSpec) -> a.Artifact:
    """The artifact of a run that succeeds, in this process."""
    runtime.execute(spec, download.run)
    return _checked(spec)


def refused_here(spec: DownloadModelSpec | DownloadDataSpec) -> str:
    """The error of a run in this process that the person must mend."""
    with pytest.raises(BadInput) as caught:
        runtime.execute(spec, download.run)
    _check_nothing_is_left(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_together(*specs: Spec, hub: HubServer, token: str | None = None) -> list[str]:
    """The errors of several runs in one process: loading `datasets` takes a while."""
    code = """
import sys
import traceback
from stages import download, runtime
for file in sys.argv[1:]:
    sys.argv = ["download", file]
    runtime._main({"model": "download-model", "data": "download-data"}, download.run, "", False)
"""
    files = []
    for number, spec in enumerate(specs):
        files.append(Path(spec.workspace) / f"{number}.json")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(spec.model_dump_json())
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, env=environment(specs[0], hub, token)
    )
    assert TOKEN not in process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(specs), process.stderr
    assert not any("a defect of ours" in error for error in errors), process.stderr
    return errors


def documents(spec: Spec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.folder / "data.jsonl").read_text().splitlines()]
