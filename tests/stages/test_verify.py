"""stages.verify on small models: what is right passes, every fault fails the gate and is told by its place."""

import json
import math
import re
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from workspaces import HIDDEN, Tensors, Workspace, check, make_workspace, rewrite, start

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.gpt_dataset import GPTDataset
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.mesh import Mesh
from stages import both_models, gate, runtime, verify
from stages.contracts import artifacts as a
from stages.contracts import specs
from stages.contracts.process import ExitCode
from stages.outcomes import BadInput, GateFailed


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("good"))


# ── What is right ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_a_process(good: Workspace) -> None:
    spec = good.verify_spec(batches=3)
    result = start(spec)
    assert (result.returncode, result.stderr) == (ExitCode.OK, "")  # nothing of transformers' either
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.VerificationArtifact)
    assert re.fullmatch(r"mean \|Δlogit\| \d\.\de-0[678] · argmax 100 % · gate 1e-04", artifact.figure)
    assert list(artifact.files) == ["verification.json", "verification.md"]
    libraries = ("safetensors", "sentencepiece", "tokenizers", "transformers")
    assert artifact.versions.libraries == {name: metadata.version(name) for name in libraries}, "what the process had loaded"
    assert 0 < artifact.mean_error < 1e-6
    assert artifact.mean_error < artifact.max_error < 1e-4
    assert artifact.loss_difference < 1e-6
    assert (artifact.argmax_agreement, artifact.allowed_mean_error, artifact.precision) == (1, 1e-4, "fp32")

    report = json.loads((spec.folder / "verification.json").read_text())
    assert report["passed"] is True
    assert report["tokens"] == 3 * 2 * 48
    assert report["mean_error"] == artifact.mean_error
    assert abs(report["loss_ours"] - math.log(400)) < 2  # of an untrained model
    assert [g["name"] for g in report["gates"] if g["probe"] is None] == [
        "mean |Δlogit|", "|Δloss|", "argmax agreement", "largest relative error of a module",
        "number of tensors that differ from their source", "number of fields that differ from config.json",
    ]  # fmt: skip
    assert report["topology"] == {"tp": 1, "pp": 1, "vpp": 1}
    assert report["tensors"] == {
        "tensors": 30, "bytes": 575232, "exact": 30, "rounded": 0, "dtypes": ["float32"], "differing": [], "unexpected": [],
    }  # fmt: skip
    assert [probe["probe"] for probe in report["probes"]] == ["padding", "long positions", "last ids of the vocabulary"]
    assert all(probe["passed"] and 0 < probe["mean_error"] < 1e-6 for probe in report["probes"])
    assert [m["module"] for m in report["modules"]] == [
        "model.embed_tokens",
        *(f"model.layers.{i}{part}" for i in range(3) for part in (".self_attn", ".mlp", "")),
        "model.norm",
        "lm_head",
    ]
    assert report["modules"][0]["max"] == 0  # a lookup is exact
    assert artifact.metrics["gates"] == report["gates"]

    card = (spec.folder / "verification.md").read_text()
    assert "Verdict: passed. Topology: tp 1 · pp 1 · vpp 1. Precision: ours fp32, transformers fp32. 288 tokens" in card
    tables = [part.splitlines() for part in card.split("\n\n") if part.startswith("|")]
    rows = len(report["gates"]) + len(report["probes"]), 1 + len(report["probes"]), len(report["modules"])
    assert tuple(len(table) - 2 for table in tables) == rows
    for row in (
        "argmax agreement | 100 % | at least 99.9 % | passed",
        "argmax agreement, padding | 100 % |  | 112 tokens, not judged",
    ):
        assert f"| {row} |" in tables[0]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1  # as many columns in every line
    module = report["modules"][4]
    assert f"| {module['module']} | {module['mean']:.1e} | {module['max']:.1e} | {module['relative']:.1e} |" in card
    data = next(line for line in tables[1] if line.startswith("| data |"))
    assert f"| {report['loss_ours']:.6f} | {report['loss_transformers']:.6f} |" in data


@pytest.mark.parametrize(
    "model",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-5},
        {"tokenizer": "huggingface"},
    ],
    ids=lambda model: ",".join(model),
)
def test_variants(tmp_path: Path, model: dict[str, Any]) -> None:
    artifact = check(make_workspace(tmp_path, **model))
    assert artifact.mean_error < 1e-6


def test_bf16(good: Workspace) -> None:
    """Ours in bf16 is off by what transformers itself is off by in bf16, from itself in fp32; not by three times as much."""
    artifact = check(good, precision="bf16")
    assert 1e-4 < artifact.mean_error < 5e-2
    assert artifact.allowed_mean_error == 5e-2
    assert artifact.precision == "bf16"
    gates = {gate["name"]: gate["value"] for gate in artifact.metrics["gates"] if gate["probe"] is None}
    assert 0.5 < gates["largest error of a module, in those of transformers' rounding"] < 2
    assert 1e-3 < artifact.metrics["transformers_rounding"] < 1e-1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_models_are_in_the_precision(good: Workspace, precision: Any) -> None:
    config = ModelConfig(**good.weights.model.config_fields())
    ours = both_models.load_ours(config, good.weights.folder(good.root), precision, Mesh.single())
    for module in (ours, both_models.load_transformers(good.source, precision).module):
        assert {parameter.dtype for parameter in module.parameters()} == {both_models.DTYPES[precision]}


def test_loss_is_that_of_the_next_token(good: Workspace) -> None:
    """On the tokens of the data: recomputed from transformers' logits, and from the data by its own reader."""
    artifact = check(good, batches=5, batch_size=1)
    tokens = IndexedDataset(good.dataset.folder(good.root) / "data")
    samples = GPTDataset(tokens, range(len(tokens)), sequence_length=48, num_samples=5, seed=gate.SEED)
    model = AutoModelForCausalLM.from_pretrained(good.source)
    texts = torch.stack([torch.from_numpy(samples[k]) for k in range(5)])  # [5, 49]
    with torch.no_grad():
        loss = F.cross_entropy(model(texts).logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    assert artifact.metrics["loss_transformers"] == pytest.approx(loss.item(), rel=1e-5)
    assert artifact.metrics["loss_ours"] == pytest.approx(loss.item(), rel=1e-5)


def test_asks_nobody(good: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("verify went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    check(good, batches=1)


def test_full_context_and_its_limit(good: Workspace) -> None:
    check(good, sequence_length=128, batches=1)
    with pytest.raises(BadInput, match=r"verify\.sequence_length=129 exceeds max_position_embeddings=128 of the model"):
        check(good, sequence_length=129)


# ── Gates ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_mean_error": 1e-9}, r"gate failed: mean \|Δlogit\| [\d.]+e-07, allowed 1e-09\n +No module stands out: "
                                   r"the error grows evenly to .* allow more in the settings of verify"),
        ({"precision": "bf16", "max_mean_error": 1e-9, "max_loss_difference": 1e-9, "min_argmax_agreement": 1.0},
         r"gate failed: mean \|Δlogit\| 0\.0\d+, allowed 1e-09"),
        ({"precision": "bf16", "max_loss_difference": 1e-9}, r"gate failed: \|Δloss\| [\d.]+(e-05)?, allowed 1e-09"),
        ({"precision": "bf16", "min_argmax_agreement": 1.0}, r"gate failed: argmax agreement 9\d.*%, needed 100 %"),
    ],
)  # fmt: skip
def test_gates_are_the_settings(good: Workspace, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GateFailed, match=message):
        check(good, **settings)


def test_a_pass_removes_the_report_of_a_failure(good: Workspace) -> None:
    spec = good.verify_spec(batches=4)
    report = spec.folder.parent / f".{spec.key}.failed.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text("{}")
    check(good, batches=4)
    assert not report.exists()


def test_not_finite(tmp_path: Path) -> None:
    def damage(weights: Tensors) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan

    workspace = make_workspace(tmp_path / "ours", edit=damage)
    with pytest.raises(GateFailed, match=r"gate failed: our model computes NaN or infinity, first at model\.layers\.1\.mlp\."):
        check(workspace)
    spec = workspace.verify_spec()
    report = json.loads((spec.folder.parent / f".{spec.key}.failed.json").read_text())
    assert report["mean_error"] is None  # JSON has no NaN
    assert report["not_finite"] == "ours: model.layers.1.mlp"

    def damage_source(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        damage(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    workspace = make_workspace(tmp_path / "both", files=damage_source)
    with pytest.raises(GateFailed, match=r"transformers' model computes NaN or infinity, first at model\.layers\.1\.mlp\."):
        check(workspace)


# ── Inputs that do not fit ──────────────────────────────────────────────────────────────────────────────────────────────


def with_inputs(spec: specs.VerifySpec, **artifacts: a.Artifact) -> specs.VerifySpec:
    refs = {name: specs.Ref(path=artifact.path) for name, artifact in artifacts.items()}
    return spec.model_copy(update={"inputs": {**spec.inputs, **refs}})


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    rewrite(workspace.dataset.folder(tmp_path), lambda facts: facts["tokenizer"].update(vocab_size=32000))
    spec = with_inputs(workspace.verify_spec(), dataset=workspace.dataset)
    with pytest.raises(BadInput, match=r"tokenizer\.vocab_size=32000 of the data exceeds vocab_size=400 of the model"):
        runtime.execute(spec, verify.run)


def test_weights_of_another_model(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, facts={"num_key_value_heads": 4})
    with pytest.raises(BadInput, match="num_key_value_heads=4 of the weights is not num_key_value_heads=2 of the model"):
        check(workspace)


def test_missing_tensor(tmp_path: Path) -> None:
    def drop(weights: Tensors) -> None:
        del weights["model.layers.2.mlp.up_proj.weight"]

    workspace = make_workspace(tmp_path, edit=drop)
    with pytest.raises(BadInput, match=r"/convert/\w+: lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        check(workspace)


def test_source_without_a_tensor(tmp_path: Path) -> None:
    """transformers would fill in random numbers, with no more than a warning."""

    def drop(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def mend(weights: Tensors) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, HIDDEN)

    workspace = make_workspace(tmp_path, files=drop, edit=mend)
    with pytest.raises(BadInput, match=r"/files: holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        check(workspace)


def test_too_little_text(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, documents=["a b", "c"])
    with pytest.raises(BadInput, match=r"inputs\.dataset: documents 0 to 2 hold \d tokens.*verify\.sequence_length=48"):
        check(workspace)


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    file = workspace.weights.folder(tmp_path) / "rank-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"inputs\.weights: .*rank-0000\.safetensors.*digest"):
        check(workspace)
