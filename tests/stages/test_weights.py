"""The stages convert, shard and merge, in this process: what they write, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from weights_inputs import HF, make_checkpoint, make_model, random_model, ref

from megatron_core_impl.checkpoint import proven
from megatron_core_impl.checkpoint.dtypes import Bytes
from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout
from stages import convert, merge, runtime, shard
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.process import EVENT_PREFIX
from stages.contracts.specs import ConvertSpec, MergeSpec, ShardSpec
from stages.outcomes import BadInput, GateFailed

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm" / "llama2_gqa" / "hf"


def converted(workspace: Path, model: a.ModelArtifact) -> a.WeightsArtifact:
    artifact = runtime.execute(ConvertSpec(workspace=str(workspace), inputs={"model": ref(model)}), convert.run)
    assert isinstance(artifact, a.WeightsArtifact)
    return artifact


def sharded(workspace: Path, weights: a.WeightsArtifact, tp: int, pp: int = 1) -> a.WeightsArtifact:
    spec = ShardSpec(workspace=str(workspace), inputs={"weights": ref(weights)}, tp=tp, pp=pp)
    artifact = runtime.execute(spec, shard.run)
    assert isinstance(artifact, a.WeightsArtifact)
    return artifact


def merged(workspace: Path, checkpoint: a.CheckpointArtifact) -> a.WeightsArtifact:
    artifact = runtime.execute(MergeSpec(workspace=str(workspace), inputs={"checkpoint": ref(checkpoint)}), merge.run)
    assert isinstance(artifact, a.WeightsArtifact)
    return artifact


def refused(workspace: Path, model: a.ModelArtifact) -> str:
    """The message with which convert refuses a model. Nothing of a result stays."""
    with pytest.raises(BadInput) as caught:
        converted(workspace, model)
    assert [path.name for path in (workspace / "convert").iterdir() if not path.name.endswith(".lock")] == []
    return str(caught.value)


# ── The way through ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_convert_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_model(dtype=dtype)
    artifact = converted(tmp_path, make_model(tmp_path, tensors, dtype=str(dtype).removeprefix("torch.")))
    assert set(artifact.files) == {"index.json", "model.safetensors"}
    stored = load_file(artifact.folder(tmp_path) / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(same_bits(stored[name], tensor) for name, tensor in tensors.items())
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (artifact.tensors, artifact.bytes, artifact.tp, artifact.pp, artifact.trained_steps) == (30, size, 1, 1, 0)
    assert artifact.figure == f"30 tensors, {words.size(size)}, bit for bit, hard-linked"
    assert artifact.model.parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
def test_golden_model(tmp_path: Path) -> None:
    hf = json.loads((GOLDEN / "config.json").read_text())
    tensors = load_file(GOLDEN / "model.safetensors")
    weights = converted(tmp_path, make_model(tmp_path, tensors, hf=hf, dtype="float32"))
    for artifact in (weights, sharded(tmp_path, weights, tp=2, pp=2)):
        reader = open_weights(artifact.folder(tmp_path))
        assert set(reader.names) == set(tensors)
        assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())


def test_shard_then_train_then_merge(tmp_path: Path) -> None:
    tensors = random_model()
    shards = sharded(tmp_path, converted(tmp_path, make_model(tmp_path, tensors)), tp=2, pp=3)
    assert shards.figure == "tp 2 · pp 3"
    assert (shards.tp, shards.pp, shards.tensors) == (2, 3, 30)
    assert shards.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert set(shards.files) == {"index.json", *(f"rank-{rank:04d}.safetensors" for rank in range(6))}
    reader = open_weights(shards.folder(tmp_path))
    assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())

    masters = {name: tensor.float() + torch.randn(tensor.shape) * 1e-4 for name, tensor in tensors.items()}
    artifact = merged(tmp_path, make_checkpoint(tmp_path, masters, layout=Layout(tp=2, pp=1, dp=3)))
    assert artifact.figure == "equals the shards, bit for bit in bfloat16"
    assert (artifact.trained_steps, artifact.tp, artifact.pp, artifact.tensors) == (2, 1, 1, 30)
    stored = load_file(artifact.folder(tmp_path) / "rank-0000.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(same_bits(stored[name], master.bfloat16()) for name, master in masters.items())


def test_merge_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    masters = {name: tensor.float() for name, tensor in random_model().items()}
    masters["model.layers.1.mlp.up_proj.weight"][40, 3] = 70_000.0
    with pytest.raises(GateFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds numbers that float16 cannot"):
        merged(tmp_path, make_checkpoint(tmp_path, masters, layout=Layout(), dtype="float16"))


def test_merge_of_a_float32_model_is_the_masters(tmp_path: Path) -> None:
    masters = random_model(dtype=torch.float32)
    artifact = merged(tmp_path, make_checkpoint(tmp_path, masters, layout=Layout(tp=2, dp=2), dtype="float32"))
    assert artifact.figure == "equals the shards, bit for bit"
    stored = load_file(artifact.folder(tmp_path) / "rank-0000.safetensors")
    assert all(same_bits(stored[name], master) for name, master in masters.items())


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = converted(tmp_path, make_model(tmp_path, random_model()))
    monkeypatch.setenv("STAGE_EVENTS", "1")
    sharded(tmp_path, weights, tp=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(EVENT_PREFIX)]
    last = json.loads(lines[-1].removeprefix(EVENT_PREFIX))
    assert last["done"] == last["total"] > 0


# ── What convert refuses ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.embed_tokens.weight", (301, 32), "dim 0 is 301, and 300 by vocab_size=300"),
        ("lm_head.weight", (300, 33), "dim 1 is 33, and 32 by hidden_size=32"),
        ("model.norm.weight", (31,), "dim 0 is 31, and 32 by hidden_size=32"),
        ("model.layers.1.mlp.up_proj.weight", (40, 32), "dim 0 is 40, and 48 by intermediate_size=48"),
        ("model.layers.2.self_attn.k_proj.weight", (32, 32), "dim 0 is 32, and 16 by num_key_value_heads=2, head_dim=8"),
        ("model.layers.2.self_attn.o_proj.weight", (32, 16), "dim 1 is 16, and 32 by num_attention_heads=4, head_dim=8"),
        ("model.layers.0.self_attn.q_proj.weight", (32,), "has shape [32], config.json says [32, 32]"),
    ],
)
def test_shape_that_contradicts_the_config_names_the_field(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    tensors = {**random_model(), name: torch.zeros(shape, dtype=torch.bfloat16)}
    text = refused(tmp_path, make_model(tmp_path, tensors))
    assert name in text
    assert message in text


def test_missing_tensors(tmp_path: Path) -> None:
    tensors = random_model()
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    assert "files: lacks model.layers.1.self_attn.v_proj.weight" in refused(tmp_path, make_model(tmp_path, tensors))


def test_unexpected_tensors(tmp_path: Path) -> None:
    extra = {f"model.layers.{n}.self_attn.q_proj.lora_A.weight": torch.zeros(1) for n in range(5)}
    text = refused(tmp_path, make_model(tmp_path, random_model() | extra))
    assert "that a llama model of this config.json does not have: model.layers.0.self_attn.q_proj.lora_A.weight, " in text
    assert "and 2 more. Is it a plain llama model" in text


def test_quantized_tensor(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {**random_model(), name: torch.zeros(48, 32, dtype=torch.int8)}
    text = refused(tmp_path, make_model(tmp_path, tensors))
    assert f"{name} is stored as int8: quantized weights cannot be trained" in text


def test_buffers_of_old_transformers_are_left_out(tmp_path: Path) -> None:
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(3)}
    artifact = converted(tmp_path, make_model(tmp_path, random_model() | buffers))
    assert artifact.tensors == 30


def test_tied_model_with_a_stored_output_layer(tmp_path: Path) -> None:
    hf = HF | {"tie_word_embeddings": True}
    tensors = random_model(hf)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert converted(tmp_path / "a", make_model(tmp_path / "a", tensors | copy, hf=hf)).tensors == 29
    copy["lm_head.weight"][3, 4] += 1
    text = refused(tmp_path / "b", make_model(tmp_path / "b", tensors | copy, hf=hf))
    assert "lm_head.weight differs from model.embed_tokens.weight, and config.json says tie_word_embeddings: true" in text


def test_mixed_dtypes_are_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors: dict[str, Tensor] = {n: t.float() if t.dim() == 1 else t for n, t in random_model().items()}
    artifact = converted(tmp_path, make_model(tmp_path, tensors))
    reader = open_weights(artifact.folder(tmp_path))
    assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())
    said = capsys.readouterr().out
    assert (
        "warning: the weights are bfloat16, but 224 numbers in float32 are among them. Training starts from what is there; the "
        "trained model will be bfloat16. To round all of them before: model.dtype: bfloat16\n"
    ) in said
    assert artifact.other_dtypes == {"float32": 224}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5e5}, "config.json: rope_theta is 10000.0, the model artifact says 500000.0: run download again"),
        ({"parameters": 5}, "the model artifact says 5: run download again"),
    ],
)
def test_artifact_that_contradicts_the_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, make_model(tmp_path, random_model(), **changes))


def test_pickled_weights(tmp_path: Path) -> None:
    tensors = random_model()
    artifact = converted(tmp_path / "a", make_model(tmp_path / "a", tensors, pickled=True))
    stored = load_file(artifact.folder(tmp_path / "a") / "rank-0000.safetensors")
    assert all(same_bits(stored[name], tensor) for name, tensor in tensors.items())
    model = make_model(tmp_path / "b", tensors, pickled=True)
    forbidden = model.model_copy(update={"spec": {**model.spec, "model": {"source": "tiny", "allow_pickle": False}}})
    (model.folder(tmp_path / "b") / a.ARTIFACT_FILE).write_text(forbidden.model_dump_json())
    assert "has only pickled weights (pytorch_model.bin)" in refused(tmp_path / "b", forbidden)


# ── What shard and merge refuse ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, r"^layout: tp=3 cannot share out num_attention_heads=4 with num_key_value_heads=2 .*\. Legal here: 1, 2, 4$"),
        (1, 4, r"^layout: pp=4 exceeds num_hidden_layers=3\. Legal here: 1 to 3$"),
    ],
)
def test_layout_that_cannot_hold_the_model(tmp_path: Path, tp: int, pp: int, message: str) -> None:
    weights = converted(tmp_path, make_model(tmp_path, random_model()))
    with pytest.raises(BadInput, match=message):
        sharded(tmp_path, weights, tp, pp)


def test_shards_that_differ_from_their_source_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = converted(tmp_path, make_model(tmp_path, random_model()))

    def same(a: Bytes, b: Bytes) -> bool:
        return np.array_equal(a, b) and a.shape[:-1] != (48, 32)

    monkeypatch.setattr(proven, "same_bytes", same)
    with pytest.raises(GateFailed, match=r"^model\.layers\.0\.mlp\.gate_proj\.weight: what was written differs"):
        sharded(tmp_path, weights, tp=2)
    assert [path.name for path in (tmp_path / "shard").iterdir() if not path.name.endswith(".lock")] == []


def test_checkpoint_without_a_rank_s_file(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, random_model(dtype=torch.float32), layout=Layout(tp=2, dp=2))
    (checkpoint.folder(tmp_path) / "checkpoints/step-000002/rank-0003.safetensors").unlink()
    with pytest.raises(BadInput, match=r"rank-0003\.safetensors: missing"):
        merged(tmp_path, checkpoint)
