"""stages.export on small models: what it writes is what transformers loads, and computes what was trained."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspaces import STEP, Tensors, Workspace, make_workspace, publish, references, rewrite, start

from megatron_core_impl.data.tokenizer import load_tokenizer
from stages import export, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import specs
from stages.contracts.config import ModelSettings
from stages.contracts.process import ExitCode
from stages.export_weights import Written, plan_shards, write_weights
from stages.outcomes import BadInput, GateFailed

PROMPTS = ("class Spec:\n    ", "def run(")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("base"))


def trained(tensors: Tensors, seed: int = 3) -> Tensors:
    """Weights that moved a little, as training moves them."""
    random = torch.Generator().manual_seed(seed)
    return {name: t + (0.05 * torch.randn(t.shape, generator=random)).to(t.dtype) for name, t in tensors.items()}


def make(workspace: Workspace, tensors: Tensors | None = None, **options: Any) -> a.ExportArtifact:
    """Export in this process."""
    facts = options.pop("facts", {})
    spec = workspace.export_spec(*workspace.train(tensors or trained(workspace.tensors()), **facts), **options)
    artifact = runtime.execute(spec, export.run)
    assert isinstance(artifact, a.ExportArtifact)
    return artifact


def model_folder(workspace: Workspace, artifact: a.ExportArtifact) -> Path:
    return artifact.folder(workspace.root) / "model"


# ── The folder ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def add_texts(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("do as you like")
    (folder / "README.md").write_text("the base model's card, which is not the new model's")


def test_as_a_process(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, files=add_texts)
    weights = trained(workspace.tensors())
    spec = workspace.export_spec(*workspace.train(weights), prompts=PROMPTS)
    result = start(spec)
    assert (result.returncode, result.stderr) == (ExitCode.OK, "")
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.ExportArtifact)
    expected = r"Hugging Face folder, 575 kB · logits equal to training's \(mean \|Δ\| \d\.\de-0[678]\)"
    assert re.fullmatch(expected, artifact.figure)
    assert (artifact.loss_before, artifact.loss_after, artifact.license) == (5.5, 2.25, "mit")
    assert (artifact.source, artifact.source_revision) == ("source", None)
    assert 0 < artifact.mean_error < 1e-6

    # transformers loads exactly the trained weights
    folder = spec.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    # everything else is as it came, byte for byte
    source = workspace.source
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()} - {"README.md"}
    for copy in folder.iterdir():
        if copy.name != "model.safetensors":
            assert copy.read_bytes() == (source / copy.name).read_bytes(), copy.name

    # the samples are greedy continuations
    samples = json.loads((spec.folder / "samples.json").read_text())
    assert samples == artifact.metrics["samples"]
    assert [sample["prompt"] for sample in samples] == list(PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for when, path in (("before", source), ("after", folder)):
        model = AutoModelForCausalLM.from_pretrained(path)
        for sample in samples:
            assert sample[when] == greedy(model, tokenizer, sample["prompt"])
    assert any(sample["before"] != sample["after"] for sample in samples)

    comparison = json.loads((spec.folder / "comparison.json").read_text())
    assert comparison["passed"] is True
    assert comparison["mean_error"] == artifact.mean_error
    assert artifact.metrics["comparison"]["gates"] == comparison["gates"]


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, new: int = 8) -> str:
    """The most likely token, one at a time, each from the whole text before it that fits the model."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = tokens[:, -(model.config.max_position_embeddings - new) :]
    read = tokenizer.decode(tokens[0], skip_special_tokens=True)
    for _ in range(new):
        best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
        if best.item() == model.config.eos_token_id:
            break
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).removeprefix(read)


@pytest.mark.parametrize(
    "model",
    [{"tie_word_embeddings": True}, {"tokenizer": "huggingface", "num_key_value_heads": 4}, {"dtype": "bfloat16"}],
    ids=lambda model: ",".join(model),
)
def test_variants(tmp_path: Path, model: dict[str, Any]) -> None:
    workspace = make_workspace(tmp_path, **model)
    weights = trained(workspace.tensors())
    artifact = make(workspace, weights)
    folder = model_folder(workspace, artifact)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == getattr(torch, model.get("dtype", "float32"))
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    assert (folder / "config.json").read_bytes() == (workspace.source / "config.json").read_bytes()
    assert artifact.mean_error < 1e-6
    kind = workspace.dataset.tokenizer.kind
    ours, theirs = load_tokenizer(folder, kind), load_tokenizer(workspace.source, kind)
    assert ours.fingerprint == theirs.fingerprint
    text = "def f(x):\n    return '⁇ é'"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(workspace.source)(text)


def test_several_files(base: Workspace) -> None:
    weights = trained(base.tensors(), seed=4)
    limit = sum(tensor.nbytes for tensor in list(weights.values())[:4])  # four fit in but for the file's header
    artifact = make(base, weights, batches=1, export={"shard_size": limit})
    folder = model_folder(base, artifact)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    assert all((folder / name).stat().st_size <= limit for name in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_plan_of_files() -> None:
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1}
    assert plan_shards(sizes, 32) == {"model.safetensors": ["a", "b", "c", "d", "e"]}
    assert list(plan_shards(sizes, 8).values()) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(plan_shards(sizes, 21)) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def age(folder: Path) -> None:
    """Make config.json one as transformers 4 wrote it: `torch_dtype`, and `rope_theta` at the top."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("files", "field"), [(None, "dtype"), (age, "torch_dtype")])
def test_config_follows_the_weights(tmp_path: Path, files: Callable[[Path], None] | None, field: str) -> None:
    """A model of another precision says so; every other field stays, in its place."""
    workspace = make_workspace(tmp_path, files=files)
    weights = {name: t.bfloat16() for name, t in trained(workspace.tensors()).items()}
    artifact = make(workspace, weights, facts={"dtype": "bfloat16"})
    folder = model_folder(workspace, artifact)
    old, new = (json.loads((path / "config.json").read_text()) for path in (workspace.source, folder))
    assert list(new) == list(old)
    assert {key: value for key, value in new.items() if old[key] != value} == {field: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert artifact.mean_error < 1e-6  # both sides start from the rounded weights


def test_old_config_stays_as_it_is(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, files=age, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    folder = model_folder(workspace, make(workspace))
    assert (folder / "config.json").read_bytes() == (workspace.source / "config.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters["rope_theta"] == 5e5


def test_asks_nobody(base: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("export went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    make(base, trained(base.tensors(), seed=6), prompts=PROMPTS, batches=1)


# ── Samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_awkward_prompts(base: Workspace) -> None:
    """None of them fails a run that has trained for hours."""
    long = "x = [" + "1, 2, " * 200
    artifact = make(base, trained(base.tensors(), seed=7), prompts=(long, "", " é⁇\x00"), batches=1)
    samples = artifact.metrics["samples"]
    assert [sample["prompt"] for sample in samples] == [long, "", " é⁇\x00"]
    folder = model_folder(base, artifact)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert samples[0]["after"] == greedy(model, tokenizer, long)


def test_without_prompts(base: Workspace) -> None:
    artifact = make(base, trained(base.tensors(), seed=8), batches=1)
    assert artifact.metrics["samples"] == []
    assert json.loads((artifact.folder(base.root) / "samples.json").read_text()) == []


# ── What must not be published ──────────────────────────────────────────────────────────────────────────────────────────


def test_failed_gate_leaves_nothing(base: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_wrongly(source: Path, model: a.ModelFacts, folder: Path, ctx: Context, *, limit: int) -> Written:
        written = write_weights(source, model, folder, ctx, limit=limit)
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return written

    monkeypatch.setattr(export, "write_weights", write_wrongly)
    spec = base.export_spec(*base.train(trained(base.tensors(), seed=9)))
    with pytest.raises(GateFailed) as caught:
        runtime.execute(spec, export.run)
    assert str(caught.value).startswith("gate failed at layer 1 (model.layers.1.mlp): mean |Δlogit|")
    assert "gate_proj and up_proj are swapped." in str(caught.value)
    left = {p.name for p in spec.folder.parent.iterdir() if spec.key in p.name}
    assert left == {f".{spec.key}.lock", f".{spec.key}.failed.json", f".{spec.key}.failed.md"}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rope_theta": 1e6}, r"inputs: rope_theta=1000000\.0 of the weights is not rope_theta=10000\.0 of the model"),
        ({"hidden_size": 32}, r"inputs: hidden_size=32 of the weights is not hidden_size=64 of the model"),
    ],
)
def test_weights_of_another_model(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(make_workspace(tmp_path), facts=facts)


def with_checkpoint(workspace: Workspace, edit: Callable[[dict[str, Any]], None]) -> specs.ExportSpec:
    """A spec whose checkpoint says something else."""
    checkpoint, merged = workspace.train(trained(workspace.tensors()))
    rewrite(checkpoint.folder(workspace.root), edit)
    spec = workspace.export_spec(checkpoint, merged)
    refs = {**spec.inputs, "checkpoint": specs.Ref(path=checkpoint.path)}
    return spec.model_copy(update={"inputs": refs})


def test_weights_of_another_checkpoint(tmp_path: Path) -> None:
    spec = with_checkpoint(make_workspace(tmp_path), lambda facts: facts.update(step=9))
    with pytest.raises(BadInput, match=rf"trained_steps={STEP} of the weights is not step=9 of the checkpoint"):
        runtime.execute(spec, export.run)


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    spec = with_checkpoint(make_workspace(tmp_path), lambda facts: facts["tokenizer"].update(fingerprint="0" * 64))
    with pytest.raises(BadInput, match=r"tokenizer \w{12} \(sentencepiece, vocab_size=400\) of the data is not the 0{12} "):
        runtime.execute(spec, export.run)


def test_model_with_another_tokenizer(tmp_path: Path) -> None:
    """The same weights, but another tokenizer.model than the data was made with."""
    workspace = make_workspace(tmp_path)
    checkpoint, merged = workspace.train(trained(workspace.tensors()))
    files = {f"files/{p.name}": p.read_bytes() for p in workspace.source.iterdir()}
    from workspaces import sentencepiece_model

    files["files/tokenizer.model"] = sentencepiece_model(399)
    other_spec = specs.DownloadModelSpec(workspace=str(tmp_path), model=ModelSettings(source="other"))
    facts = {name: getattr(workspace.model, name) for name in ("model", "tokenizer_files", "license", "source", "revision")}
    other = publish(other_spec, a.ModelArtifact, files, **facts)
    spec = workspace.export_spec(checkpoint, merged)
    spec = spec.model_copy(update={"inputs": {**spec.inputs, **references({"model": other})}})
    with pytest.raises(BadInput, match=r"tokenizer \w{12} of the model is not the \w{12} \(sentencepiece, vocab_size=400\)"):
        runtime.execute(spec, export.run)
