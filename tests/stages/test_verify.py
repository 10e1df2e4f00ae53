"""stages.verify on small models: what is right passes, every fault fails the gate and is told by its place."""

import json
import math
import re
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from workspaces import HEAD_DIM, HIDDEN, Tensors, Workspace, make_workspace, rewrite, start

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.gpt_dataset import GPTDataset
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.layers.mlp import MLP
from megatron_core_impl.mesh import Mesh
from stages import both_models, gate, runtime, verify
from stages.contracts import artifacts as a
from stages.contracts import specs
from stages.contracts.process import ExitCode
from stages.outcomes import BadInput, GateFailed


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("good"))


def check(workspace: Workspace, **settings: Any) -> a.VerificationArtifact:
    artifact = runtime.execute(workspace.verify_spec(**settings), verify.run)
    assert isinstance(artifact, a.VerificationArtifact)
    return artifact


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


# ── Faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def swap_heads(weights: Tensors) -> None:
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    q[: 2 * HEAD_DIM] = q[: 2 * HEAD_DIM].roll(HEAD_DIM, 0)


def interleave(weights: Tensors) -> None:
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = w.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(w.shape).contiguous()


def swap_gate_and_up(weights: Tensors) -> None:
    gate, up = (f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def transpose(weights: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name].t().contiguous()


def shift_vocabulary(weights: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].roll(1, 0)


def shift_head(weights: Tensors) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(-1, 0)


@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        (swap_heads, r"layer 1 \(model\.layers\.1\.self_attn\).*; layer 0 agrees to \d\.\de-0[67]\.",
         "Heads of q_proj are those of transformers in another order: 1, 0, 2, 3."),
        (interleave, r"layer 0 \(model\.layers\.0\.self_attn\).*attention output.*; the embedding agrees exactly\.",
         "Rows of k_proj and q_proj are in the interleaved RoPE convention"),
        (swap_gate_and_up, r"layer 2 \(model\.layers\.2\.mlp\).*mlp output.*; layers 0-1 agree to \d\.\de-0[67]\.",
         "gate_proj and up_proj are swapped."),
        (transpose, r"layer 0 \(model\.layers\.0\.self_attn\)", "o_proj is that of transformers transposed."),
        (shift_vocabulary, r"the embedding output \(model\.embed_tokens\).*of its size\)\.",
         "Rows of embed_tokens are those of transformers shifted by one."),
        (shift_head, r"the logits \(lm_head\).*; layers 0-2 agree to \d\.\de-0[67]\.",
         "Rows of lm_head are those of transformers shifted by one."),
    ],
)  # fmt: skip
def test_fault_in_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Tensors], None], place: str, cause: str
) -> None:
    workspace = make_workspace(tmp_path, edit=fault)
    with pytest.raises(GateFailed) as caught:
        check(workspace)
    message = str(caught.value)
    assert caught.value.code == ExitCode.GATE_FAILED
    assert re.match(rf"gate failed at {place}", message, re.DOTALL), message
    assert re.search(r"mean \|Δlogit\| \d[\d.]*, allowed 1e-04", message)
    assert cause in message
    spec = workspace.verify_spec()
    report_file = spec.folder.parent / f".{spec.key}.failed.json"
    assert message.endswith(f"Report: the table in the log, and {report_file}")
    report = json.loads(report_file.read_text())
    assert report["passed"] is False
    assert f"({report['first_difference']})" in message
    assert report["hint"] in message
    left = [f".{spec.key}.{end}" for end in ("failed.json", "failed.md", "lock")]
    assert sorted(p.name for p in spec.folder.parent.iterdir()) == left
    assert "Verdict: **failed**" in report_file.with_suffix(".md").read_text()
    table = capsys.readouterr().out
    assert re.search(r"^model\.layers\.0\.self_attn +\d\.\de", table, re.MULTILINE)


def test_wrong_theta(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, facts={"rope_theta": 1e6})
    with pytest.raises(GateFailed) as caught:
        check(workspace)
    message = str(caught.value)
    assert message.startswith("gate failed at layer 0 (model.layers.0.self_attn): ")
    assert "the error grows along the sequence from 0 at position 0" in message
    assert "Our model is built with rope_theta=1000000.0, config.json says 10000.0." in message


def test_fault_that_hardly_moves_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With weights this small attention looks everywhere alike, whatever the queries are."""
    workspace = make_workspace(tmp_path, edit=swap_heads, initializer_range=0.005)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(model\.layers\.1\.self_attn\): "):
        check(workspace)
    log = capsys.readouterr().out
    assert "passed  mean |Δlogit|" in log
    assert "FAILED  largest relative error of a module" in log


def test_what_a_person_allows_passes_but_for_what_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tolerance is for how things are computed. Whether tensors are the same is no matter of tolerance."""
    allowed = {"max_mean_error": 1e3, "max_loss_difference": 1e3, "min_argmax_agreement": 0.0}
    workspace = make_workspace(tmp_path, edit=swap_heads)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(.*\.self_attn\): number of tensors that differ"):
        check(workspace, **allowed)
    assert "FAILED  number of tensors that differ from their source 1, allowed 0" in capsys.readouterr().out
    workspace = make_workspace(tmp_path / "sound")
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(GateFailed, match=r"gate failed at layer 0 \(model\.layers\.0\.mlp\): mean"):
        check(workspace)
    assert check(workspace, **allowed).mean_error > 1e-3


def test_fault_in_bf16(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, edit=swap_gate_and_up)
    with pytest.raises(
        GateFailed, match=r"gate failed at layer 2 \(model\.layers\.2\.mlp\): mean \|Δlogit\| 0\.\d+, allowed 5e-02"
    ):
        check(workspace, precision="bf16")


def test_faults_below_what_bf16_rounds_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logits of small weights pass whatever is wrong. Three other gates do not: on tensors, on config.json, on rounding."""
    tiny = {"initializer_range": 0.005}
    workspace = make_workspace(tmp_path / "tensor", edit=swap_heads, **tiny)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(model\.layers\.1\.self_attn\): number of") as caught:
        check(workspace, precision="bf16")
    assert "passed  mean |Δlogit|" in capsys.readouterr().out
    assert "in another order: 1, 0, 2, 3" in str(caught.value)

    def nudge(weights: Tensors) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1e-7

    workspace = make_workspace(tmp_path / "bit", edit=nudge, **tiny)
    with pytest.raises(GateFailed) as caught:
        check(workspace, precision="bf16")
    assert str(caught.value).startswith(
        "gate failed at layer 2 (model.layers.2.mlp): number of tensors that differ from their source 1, allowed 0\n"
        "       First of them: model.layers.2.mlp.up_proj.weight. What is computed from it differs by no more than rounding "
    )

    workspace = make_workspace(tmp_path / "config", facts={"norm_eps": 2e-6}, **tiny)
    with pytest.raises(GateFailed, match=r"Our model is built with rms_norm_eps=2e-06, config.json says 1e-06"):
        check(workspace, precision="bf16", max_mean_error=1.0)

    workspace = make_workspace(tmp_path / "computation", **tiny)
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) * 1.05)
    with pytest.raises(GateFailed) as caught:
        check(workspace, precision="bf16")
    assert str(caught.value).startswith(
        "gate failed at layer 0 (model.layers.0.mlp): largest error of a module, in those of transformers' rounding"
    )


def test_failure_as_a_process(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, edit=swap_gate_and_up)
    spec = workspace.verify_spec()
    result = start(spec, STAGE_EVENTS="1")
    assert result.returncode == ExitCode.GATE_FAILED
    assert result.stderr.startswith("error: verify: gate failed at layer 2 (model.layers.2.mlp): mean |Δlogit|")
    assert "Traceback" not in result.stderr
    events = [json.loads(line[8:]) for line in result.stdout.splitlines() if line.startswith("@@stage ")]
    assert (events[-1]["event"], events[-1]["code"]) == ("error", 3)
    assert "model.layers.2.mlp " in result.stdout  # the table
    assert not spec.folder.exists()


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
