"""Training against the reference: losses and gradient norms that Megatron-LLM computed on a CPU (../shared/golden/training)."""

import gzip
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_core_impl.checkpoint.sharded import write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.indexed_dataset import IndexedDatasetWriter
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import read_metrics
from megatron_core_impl.models.families import tensors
from megatron_core_impl.trainer import Job, TrainConfig, train

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
STEPS = 3  # of the reference's 20; all 20 agree as well

MODEL = ModelConfig(
    family="llama", vocab_size=32000, hidden_size=128, intermediate_size=176, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip
DIGEST = "dc08da2c7bedf6e1740ba5200f9449526b8795d575f7bb03858d650a1d454153"  # of golden/make_models.py
IN_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(TrainConfig):
    """The reference spends its first step at a learning rate of 0."""

    def learning_rate(self, step: int) -> float:
        return super().learning_rate(step - 1)


def write_weights(folder: Path) -> None:
    """The model that golden/make_models.py makes: drawn in the order of transformers' parameters."""
    layers = [f"model.layers.{layer}.{name}.weight" for layer in range(MODEL.num_hidden_layers) for name in IN_LAYER]
    shapes = {spec.name: spec.shape for spec in tensors(MODEL)}
    generator = torch.Generator().manual_seed(7)
    drawn = {}
    for name in ("model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"):
        values = torch.randn(shapes[name], generator=generator) * 0.02
        drawn[name] = values * 5 + 1 if "norm" in name else values
    digest = hashlib.sha256()
    for name, values in sorted(drawn.items()):
        digest.update(name.encode() + values.numpy().tobytes())
    if digest.hexdigest() != DIGEST:
        pytest.skip("this PyTorch draws other random numbers")
    folder.mkdir()
    write_rank_file(folder, 0, [(name, shapes[name], whole(shapes[name]), values) for name, values in drawn.items()])
    write_index(folder, layout={"tp": 1, "pp": 1, "dp": 1})


def write_dataset(folder: Path) -> None:
    """What the reference's preprocessing writes with --append_eod."""
    folder.mkdir()
    shutil.copy(GOLDEN / "tokenizer" / "llama2.model", folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder, "sentencepiece", parse_special=True)
    with (
        gzip.open(GOLDEN / "preprocess" / "code.jsonl.gz", "rt") as lines,
        IndexedDatasetWriter(folder / "data", np.uint16) as out,
    ):
        for line in lines:
            out.add_sequence([*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id])
            out.end_document()


def test_equals_the_reference(tmp_path: Path) -> None:
    config = ReferenceConfig(
        steps=20, sequence_length=256, micro_batch_size=2, global_batch_size=8, lr=1e-3, min_lr=1e-4, warmup_steps=5,
        split="969,30,1", eval_batches=1, log_interval=1,
    )  # fmt: skip
    write_weights(tmp_path / "weights")
    write_dataset(tmp_path / "dataset")
    job = Job(
        config=config, model=MODEL, weights=tmp_path / "weights", dataset=tmp_path / "dataset" / "data",
        dataset_fingerprint="f", folder=tmp_path / "run",
    )  # fmt: skip
    steps = iter(range(STEPS + 1))
    train(job, Mesh.single(), should_stop=lambda: next(steps) == STEPS)
    ours = [line for line in read_metrics(job.folder) if "loss" in line]
    theirs = json.loads((GOLDEN / "training" / "gqa_tp1.json").read_text())[:STEPS]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["lm_loss"] for line in theirs], rel=0, abs=2e-6)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=2e-6, abs=0)
    assert [line["lr"] for line in ours[1:]] == pytest.approx([line["lr_of_next_step"] for line in theirs[:-1]], rel=1e-12)
