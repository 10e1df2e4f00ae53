"""Every family through the stages of weights: convert, verify, shard, merge, export; and what each stage says of its words."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from weights_inputs import make_model
from workspaces import STEP, Workspace, make_workspace, publish, references

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import ModelConfig, RopeScaling, StackedTensor
from megatron_core_impl.models import families
from stages import convert, export, export_weights, merge, runtime, shard, verify
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import specs
from stages.contracts.train_settings import TrainSettings
from stages.outcomes import BadInput, GateFailed

FALCON: dict[str, Any] = {
    "model_type": "falcon", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm" / "falcon7" / "hf"
MLP, QKV = "mlp.dense_h_to_4h.weight", "self_attention.query_key_value.weight"
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2", "tokenizer": "huggingface", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "falcon-7b": {"model_type": "falcon"},
    "falcon-40b": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip


def run(stage: Any, spec: specs.Spec) -> Any:
    return runtime.execute(spec, stage.run)


def converted(workspace: Workspace) -> a.WeightsArtifact:
    spec = specs.ConvertSpec(workspace=str(workspace.root / "again"), inputs=references({"model": workspace.model}))
    shutil.copytree(workspace.model.folder(workspace.root), workspace.model.folder(workspace.root / "again"))
    artifact: a.WeightsArtifact = run(convert, spec)
    shutil.rmtree(workspace.weights.folder(workspace.root))
    shutil.copytree(artifact.folder(workspace.root / "again"), artifact.folder(workspace.root))
    return artifact


def checkpoint_of(workspace: Workspace, shards: a.WeightsArtifact) -> a.CheckpointArtifact:
    """What training would leave that changed nothing: the shards are a checkpoint."""
    spec = specs.TrainSpec(
        workspace=str(workspace.root), inputs=references({"weights": shards, "dataset": workspace.dataset}),
        settings=TrainSettings(steps=STEP),
    )  # fmt: skip

    def write(scratch: Path) -> None:
        shutil.copytree(shards.folder(workspace.root), scratch / "step", ignore=lambda *_: [a.ARTIFACT_FILE])

    artifact: a.CheckpointArtifact = publish(
        spec, a.CheckpointArtifact, write,
        model=shards.model, tokenizer=workspace.dataset.tokenizer, checkpoint="step", step=STEP, consumed_samples=1,
        consumed_tokens=1, tp=shards.tp, pp=shards.pp, dp=1, loss_before=5.0, loss_after=4.0,
    )  # fmt: skip
    return artifact


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
def test_all_the_way_and_back(tmp_path: Path, model: dict[str, Any]) -> None:
    workspace = make_workspace(tmp_path, **model)
    workspace.weights = converted(workspace)
    verified = run(verify, workspace.verify_spec(batches=1))
    assert verified.argmax_agreement == 1
    root = str(tmp_path)
    shards = run(shard, specs.ShardSpec(workspace=root, inputs=references({"weights": workspace.weights}), tp=2, pp=2))
    checkpoint = checkpoint_of(workspace, shards)
    merged = run(merge, specs.MergeSpec(workspace=root, inputs=references({"checkpoint": checkpoint})))
    exported = run(export, workspace.export_spec(checkpoint, merged, prompts=("def ",), batches=1))
    folder = exported.folder(tmp_path) / "model"
    (sample,) = exported.metrics["samples"]
    assert sample["before"] == sample["after"] != ""
    source, written = (load_file(path / "model.safetensors") for path in (workspace.source, folder))
    assert source.keys() == written.keys()
    assert all(same_bits(written[name], tensor) for name, tensor in source.items())
    assert (folder / "config.json").read_bytes() == (workspace.source / "config.json").read_bytes()
    theirs, again = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (workspace.source, folder))
    tokens = torch.randint(400, (1, 40))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again(tokens).logits)


def test_what_export_fuses_is_read_back_as_convert_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path, **FAMILIES["falcon-7b"])
    weights = converted(workspace)
    spec, scratch = workspace.verify_spec(batches=1), tmp_path / "published"
    scratch.mkdir()

    def another_way(table: Sequence[StackedTensor]) -> list[StackedTensor]:
        back = {stacked.name: stacked for stacked in invert(table)}
        q = back["model.layers.0.self_attn.q_proj.weight"]
        first, *others = q.parts
        moved = replace(first, start=first.start + 1, stop=first.stop + 1)
        return list((back | {q.name: replace(q, parts=(moved, *others))}).values())

    monkeypatch.setattr(export_weights, "invert", another_way)
    with pytest.raises(
        GateFailed, match=r"layers\.0\.self_attn\.q_proj\.weight: what was written, read as convert reads it, diff"
    ):
        export_weights.write_weights(weights.folder(tmp_path), weights.model, scratch, Context(spec, scratch), limit=10**9)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
def test_golden_falcon(tmp_path: Path) -> None:
    hf, tensors = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "model.safetensors")
    model = make_model(tmp_path, tensors, hf=hf, dtype="float32")
    weights = run(convert, specs.ConvertSpec(workspace=str(tmp_path), inputs=references({"model": model})))
    config = families.config_from_hf(hf)
    table = families.family_of(config).hf_tensors(config)
    again = Rearranged(open_weights(weights.folder(tmp_path)), table)
    assert set(again.names) == set(tensors)
    assert all(same_bits(again.read(name), tensor) for name, tensor in tensors.items())


# ── Faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(tmp_path: Path, **options: Any) -> str:
    workspace = make_workspace(tmp_path, **options)
    with pytest.raises(GateFailed) as caught:
        run(verify, workspace.verify_spec(batches=1))
    return str(caught.value)


def swap_heads(weights: dict[str, torch.Tensor]) -> None:
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    q[:32] = q[:32].roll(16, 0)


def shift_embedding(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)


def interleave(weights: dict[str, torch.Tensor]) -> None:
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = w.view(-1, 2, 8, *w.shape[1:]).transpose(1, 2).reshape(w.shape).contiguous()


def forget_norm_of_mlp(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp_layernorm.bias"].zero_()


@pytest.mark.parametrize(
    ("model", "edit", "place", "cause"),
    [
        ("falcon-7b", swap_heads, "layer 1 (model.layers.1.self_attn)", "Heads of q_proj are those of transformers in another"),
        ("falcon-7b", shift_embedding, "the embedding output (model.embed_tokens)", "Rows of embed_tokens are those of"),
        ("falcon-40b", forget_norm_of_mlp, "layer 2 (model.layers.2.mlp)", "Weights of mlp_layernorm are not those"),
        ("qwen2", interleave, "layer 0 (model.layers.0.self_attn)", "Rows of k_proj and q_proj are in the interleaved RoPE"),
    ],
)
def test_a_fault_is_named_in_canonical_words(tmp_path: Path, model: str, edit: Any, place: str, cause: str) -> None:
    message = check(tmp_path, edit=edit, **FAMILIES[model] | {"dtype": "float32"})
    assert message.startswith(f"gate failed at {place}")
    assert cause in message


@pytest.mark.parametrize(
    ("model", "facts", "message"),
    [
        ("falcon-7b", {"norm_eps": 1e-2}, "Our model is built with layer_norm_epsilon=0.01, config.json says 1e-05."),
        ("falcon-7b", {"activation": "relu"}, "Our model is built with activation=relu, config.json says gelu."),
        ("mistral", {"sliding_window": 19}, "Our model is built with sliding_window=19, config.json says 20."),
        ("llama3", {"rope_scaling": RopeScaling(kind="linear", factor=8.0)}, "Our model is built with rope_parameters=RopeSc"),
    ],
)
def test_a_model_built_otherwise_is_told_in_the_words_of_config_json(
    tmp_path: Path, model: str, facts: dict[str, Any], message: str
) -> None:
    assert message in check(tmp_path, facts=facts, **FAMILIES[model])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (MLP, (256, 32), "dim 0 is 256, and 128 by ffn_hidden_size=128"),
        (QKV, (64, 32), "dim 0 is 64, and 48 by num_attention_heads=4, num_kv_heads=1, head_dim=8"),
        (QKV, None, f"files: lacks transformer.h.1.{QKV}"),
    ],
)
def test_convert_speaks_the_family_s_words(tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str) -> None:
    tensors = {name: torch.zeros(size) for name, size in families.hf_shapes(families.config_from_hf(FALCON)).items()}
    del tensors[f"transformer.h.1.{name}"]
    if shape is not None:
        tensors[f"transformer.h.1.{name}"] = torch.zeros(shape)
    model = make_model(tmp_path, tensors, hf=FALCON, dtype="float32")
    with pytest.raises(BadInput) as caught:
        run(convert, specs.ConvertSpec(workspace=str(tmp_path), inputs=references({"model": model})))
    assert message in str(caught.value)


def test_a_tied_falcon_with_a_stored_output_layer(tmp_path: Path) -> None:
    """As tiiuae/falcon-7b has it; and the tables that its own code once stored."""
    shapes = families.hf_shapes(families.config_from_hf(FALCON))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    tensors["transformer.h.0.self_attention.maybe_rotary.inv_freq"] = torch.zeros(4)
    model = make_model(tmp_path, tensors, hf=FALCON, dtype="float32")
    weights = run(convert, specs.ConvertSpec(workspace=str(tmp_path), inputs=references({"model": model})))
    assert weights.tensors == len(families.tensors(families.config_from_hf(FALCON)))


# ── Facts ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_facts_are_the_fields_of_a_model() -> None:
    """What is added to the one must be added to the other, or stages would build another model than was downloaded."""
    others = {"dtype", "parameters", "added_tokens", "new_rows"}
    assert set(a.ModelFacts.model_fields) == {field.name for field in fields(ModelConfig)} | others
    config = ModelConfig(
        family="mistral", vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=9, rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )  # fmt: skip
    facts = a.ModelFacts(**vars(config), dtype="float32", parameters=1)
    read = a.ModelFacts.model_validate_json(facts.model_dump_json())
    assert ModelConfig(**read.config_fields()) == config
