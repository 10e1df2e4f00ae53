"""Stage push as a process: the card, a dry run, a folder, and a Hub on loopback, over plain HTTP and over Xet."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_xet
import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.numpy import save

from megatron_core_impl.config import ModelConfig
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings, PushSettings
from stages.contracts.specs import DownloadModelSpec, PushSpec, Ref, Spec

ROOT = Path(__file__).parents[2]
TOKEN, READ_TOKEN = "hf_writeSECRETwriteSECRET", "hf_readSECRETreadSECRET"
_CONFIG = ModelConfig(
    family="llama", vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
)  # fmt: skip
MODEL = a.ModelFacts(**vars(_CONFIG), dtype="float32", parameters=856)
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users |= {TOKEN: "ada", READ_TOKEN: "ada"}
        server.readers.add(READ_TOKEN)
        yield server


def publish(workspace: Path, kind: type[a.Artifact], files: dict[str, bytes], spec: dict[str, Any], **facts: Any) -> Ref:
    """An artifact, as the stage that makes it would leave it."""
    folder = workspace / kind.__name__
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    records = {n: a.FileRecord(size=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in files.items()}
    artifact = kind(
        stage="any", key="0", path=kind.__name__, files=records, fingerprint="", inputs={}, spec=spec, figure="", created="",
        versions=a.Versions(package="0.1.0", python="3.11.9", torch="2.13.0"), wall_seconds=0, **facts,
    )  # fmt: skip
    fingerprint = a.fingerprint_of(str(kind.model_fields["kind"].default), records, artifact.facts())
    artifact = artifact.model_copy(update={"fingerprint": fingerprint})
    (folder / a.ARTIFACT_FILE).write_text(artifact.model_dump_json())
    return Ref(path=kind.__name__, fingerprint=fingerprint)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Ref]:
    workspace = tmp_path / "ws"
    train = {"settings": {"lr": 3e-4, "steps": 200, "schedule": "cosine", "log_interval": 10}}
    return {
        "export": publish(
            workspace, a.ExportArtifact, {f"model/{n}": c for n, c in FILES.items()} | {"samples.json": b"[]"}, {},
            model=MODEL, loss_before=8.32, loss_after=3.11, mean_error=2.1e-7, license="llama2",
            source="meta-llama/Llama-2-7b-hf", source_revision="0123456789abcdef" * 2,
        ),
        "checkpoint": publish(
            workspace, a.CheckpointArtifact, {}, train, model=MODEL, tokenizer=TOKENIZER, checkpoint="checkpoints/step-000200",
            step=200, consumed_samples=1600, consumed_tokens=1_638_400, tp=2, pp=1, dp=1, loss_before=8.32, loss_after=3.11,
        ),
        "dataset": publish(
            workspace, a.DatasetArtifact, {}, {}, tokenizer=TOKENIZER, dtype="uint16", documents=2211, empty_documents=3,
            malformed_lines=0, tokens=9_480_112, bos_eos="eos", content="text", sets=(),
        ),
        "data": publish(
            workspace, a.RawDataArtifact, {}, {"data": {"source": "/home/ada/Lib", "text_column": "text"}}, documents=2214,
            source="Lib", revision=None, text_bytes=31_400_000,
            sets=(a.RawSet(name="data", role="all", files=("a.jsonl",), origins=("a.jsonl",), format="text",
                           text_columns=("text",), columns={}, source="Lib", documents=None, text_bytes=31_400_000),),
        ),
        "verification": publish(
            workspace, a.VerificationArtifact, {}, {}, mean_error=2.2e-7, max_error=1e-6, loss_difference=1e-8,
            argmax_agreement=1.0, allowed_mean_error=1e-4, precision="fp32",
        ),
    }  # fmt: skip


def push_spec(tmp_path: Path, inputs: dict[str, Ref], **settings: Any) -> PushSpec:
    return PushSpec(workspace=str(tmp_path / "ws"), inputs=inputs, settings=PushSettings(**settings))


def run(
    spec: Spec, hub: HubServer | None = None, token: str | None = None, *, stage: str = "push", xet: bool = False
) -> tuple[int, str, str]:
    """The stage as a process that can reach nothing but the test's Hub."""
    workspace = Path(spec.workspace)
    (workspace / "spec.json").write_text(spec.model_dump_json())
    environment = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(workspace.parent / "home"),
        "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    process = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", str(workspace / "spec.json")],
        capture_output=True, text=True, env=environment, cwd=workspace.parent, timeout=120,
    )  # fmt: skip
    assert "SECRET" not in process.stdout + process.stderr, "the token is nobody's business"
    return process.returncode, process.stdout, process.stderr


def done(spec: PushSpec, hub: HubServer | None = None, token: str | None = None, *, xet: bool = False) -> a.PushArtifact:
    code, out, err = run(spec, hub, token, xet=xet)
    assert code == 0, out + err
    assert {p.name for p in spec.folder.iterdir()} == {"README.md", "receipt.json", "artifact.json"}
    assert not any(b"SECRET" in p.read_bytes() for p in spec.folder.iterdir())
    artifact = a.find_intact(spec.folder)
    assert isinstance(artifact, a.PushArtifact)
    return artifact


def refused(spec: PushSpec, hub: HubServer | None = None, token: str | None = None, *, code: int = 2) -> str:
    """The error of a run that ends without a result: one line, no traceback."""
    got, out, err = run(spec, hub, token)
    assert got == code, out + err
    assert "Traceback" not in err
    assert not spec.folder.exists()
    return err.strip().splitlines()[-1]


def test_dry_run_says_what_it_would_do(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    spec = push_spec(tmp_path, inputs, repo="ada/fine")
    code, out, err = run(spec)
    assert code == 0, err
    assert "would upload to a private repo ada/fine:" in out
    assert f"      {len(WEIGHTS) / 1e6:.1f} MB  model.safetensors" in out
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.PushArtifact)
    assert artifact.figure == "dry run: would upload 4 files, 1.2 MB to a private repo ada/fine"
    assert set(artifact.published) == set(FILES), "samples.json is not the model's"
    receipt = json.loads((spec.folder / "receipt.json").read_text())
    assert receipt["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_card(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    spec = push_spec(tmp_path, inputs, repo="ada/fine")
    assert run(spec)[0] == 0
    card = ModelCard.load(spec.folder / "README.md")
    assert card.data.license == "llama2"
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf"
    assert card.data.library_name == "transformers"
    assert "megatron-flows" in card.data.tags
    for line in (
        'model = AutoModelForCausalLM.from_pretrained("ada/fine")',
        "| loss | 8.3200 | 3.1100 |",
        "| perplexity | 4,105 | 22.42 |",
        "| documents | 2,211, 31.4 MB of text |",
        "| layout | 2 processes = dp 1 × tp 2 × pp 1 |",
        "| length | 200 steps, 1,638,400 tokens that count in the loss |",
        "| lr | 0.0003 |",
        "| base model, fp32 | 2.2e-07 | 1.0e-06 | 0.0001 | 100.00 % |",
        "| torch | 2.13.0 |",
        "That of the base model: llama2.",
    ):
        assert line in card.text.splitlines()
    assert "/home/ada" not in card.content, "no path of this machine"
    assert "log_interval" not in card.text


def test_folder(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    target = tmp_path / "shelf"
    spec = push_spec(tmp_path, inputs, to="folder", folder=str(target))
    artifact = done(spec)
    assert {p.name: p.read_bytes() for p in target.iterdir() if p.name != "README.md"} == {
        n: c for n, c in FILES.items() if n != "README.md"
    }
    assert "# shelf" in (target / "README.md").read_text()
    assert artifact.target == str(target)
    assert a.find_reusable(spec.folder) == artifact
    same_size = b"x" * len(FILES["config.json"])
    (target / "config.json").write_bytes(same_size)
    assert a.find_reusable(spec.folder) is None, "the folder is no longer as it was published"
    assert a.find_intact(spec.folder) == artifact, "its own files are"
    assert (tmp_path / "ws/ExportArtifact/model/config.json").read_bytes() == FILES["config.json"], "its files are its own"
    (target / "left-over.txt").write_text("of the push before")
    done(spec)
    assert {p.name for p in target.iterdir()} == set(FILES), "an earlier push is replaced as a whole"
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("ten years of work")
    error = refused(push_spec(tmp_path, inputs, to="folder", folder=str(target)))
    assert f"push.folder: {target} holds something else than an earlier push: thesis.tex. Name another folder" in error
    assert (target / "thesis.tex").exists()
    done(push_spec(tmp_path, inputs, to="folder", folder=str(target), repo="ada/fine"))
    assert (target / "ada/fine/model.safetensors").exists()
    assert (target / "thesis.tex").exists()


@pytest.mark.parametrize("xet", [False, True], ids=["http", "xet"])
def test_hub(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer, xet: bool) -> None:
    hub.xet = xet
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", commit_message="First light")
    artifact = done(spec, hub, TOKEN, xet=xet)
    repo = hub.repos["models", "ada/fine"]
    assert repo.private
    assert repo.messages[-1] == "First light"
    assert set(repo.head) == {*FILES, ".gitattributes"}
    assert repo.head["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert repo.head["README.md"].content == (spec.folder / "README.md").read_bytes()
    assert artifact.commit == repo.branches["main"]
    assert artifact.target == f"{hub.url}/ada/fine"
    assert artifact.figure == f"4 files, 1.2 MB at {hub.url}/ada/fine (private), digests equal"
    if xet:
        stored = sum(p.stat().st_size for p in (hub.folder / "xet").rglob("*") if p.is_file())
        assert stored > 0.9 * len(WEIGHTS), "the weights went through the Hub's own storage"
    else:
        assert hub.uploads[hashlib.sha256(WEIGHTS).hexdigest()] == WEIGHTS
        assert all("authorization" not in request.headers for request in hub.asked("PUT", "/upload/"))


@pytest.mark.parametrize("xet", [False, True], ids=["http", "xet"])
def test_what_was_pushed_downloads(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer, xet: bool) -> None:
    hub.xet = xet
    done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN, xet=xet)
    if xet:  # the real Hub's storage knows the Xet hash of what was uploaded; this one must be told
        head = hub.repos["models", "ada/fine"].head
        [pushed] = hf_xet.hash_files([str(tmp_path / "ws/ExportArtifact/model/model.safetensors")])
        head["model.safetensors"] = replace(head["model.safetensors"], xet_hash=pushed.hash)
    spec = DownloadModelSpec(workspace=str(tmp_path / "ws"), model=ModelSettings(source="ada/fine"))
    code, out, err = run(spec, hub, TOKEN, stage="download", xet=xet)
    assert code == 0, out + err
    assert (spec.folder / "files/model.safetensors").read_bytes() == WEIGHTS
    assert bool(hub.asked("GET", "/storage/")) != xet
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.ModelArtifact)
    assert artifact.license == "llama2", "the licence is carried over"


def test_weights_of_an_earlier_push_do_not_stay(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": "{}", "notes.md": "mine"}
    hub.add("ada/fine", old | {".gitattributes": ""}, private=True)
    done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN)
    assert set(hub.repos["models", "ada/fine"].head) == {*FILES, ".gitattributes", "notes.md"}


def test_hub_refusals(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine")
    error = refused(spec, hub)
    assert "push.to=hub needs a token: set the environment variable HF_TOKEN to one with the role write from" in error
    assert "the Hub does not accept this token (401)" in refused(spec, hub, "hf_wrongSECRET")
    error = refused(spec, hub, READ_TOKEN)
    assert "the account of this token may not do that with ada/fine (403)" in error
    assert "role write" in error
    assert "(403)" in refused(push_spec(tmp_path, inputs, to="hub", repo="meta/fine"), hub, TOKEN)
    hub.add("ada/fine", {".gitattributes": ""}, private=False)
    assert "push.private: ada/fine exists and is public. Make it private at" in refused(spec, hub, TOKEN)
    assert "cannot reach the Hub at http://127.0.0.1:9 for ada/fine" in refused(spec, None, TOKEN)


def test_an_upload_that_differs_is_no_success(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    hub.corrupt |= {"model.safetensors", "tokenizer.json"}
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN, code=3)
    assert "after the upload 2 of 4 files of" in error
    assert "are missing or differ from those here: model.safetensors, tokenizer.json. Do not use commit" in error


def test_a_changed_export_is_not_published(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    weights = tmp_path / "ws/ExportArtifact/model/model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"\0")
    assert "inputs.export: " in refused(push_spec(tmp_path, inputs))
