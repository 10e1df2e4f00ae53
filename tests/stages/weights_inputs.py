"""Small inputs for the stages of weights: the artifacts that download and train would have made."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_core_impl.checkpoint.sharded import write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import dp_rows, rank_slices, replica
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings
from stages.contracts.specs import DownloadModelSpec, Ref, TrainSpec
from stages.contracts.train_settings import LayoutSettings, TrainSettings

HF: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def random_model(hf: Mapping[str, Any] = HF, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A model's tensors by name."""
    generator = torch.Generator().manual_seed(0)
    specs = families.tensors(families.config_from_hf(hf))
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in specs}


def facts(config: ModelConfig, dtype: str = "bfloat16") -> a.ModelFacts:
    return a.ModelFacts.model_validate(
        {**asdict(config), "dtype": dtype, "parameters": families.count_parameters(config)}
    )  # fmt: skip


def ref(artifact: a.Artifact) -> Ref:
    return Ref(path=artifact.path, fingerprint=artifact.fingerprint)


def make_model(
    workspace: Path, tensors: Mapping[str, Tensor], *, hf: Mapping[str, Any] = HF, pickled: bool = False, **changes: Any
) -> a.ModelArtifact:
    """What download makes of a Hugging Face model. `changes` are facts that differ from config.json's."""

    def run(spec: DownloadModelSpec, ctx: Context) -> a.ModelArtifact:
        files = ctx.scratch / "files"
        files.mkdir()
        (files / "config.json").write_text(json.dumps(hf))
        if pickled:
            torch.save(dict(tensors), files / "pytorch_model.bin")
        else:
            save_file(dict(tensors), files / "model.safetensors", {"format": "pt"})
        model = facts(families.config_from_hf(hf)).model_copy(update=changes)
        return ctx.artifact(a.ModelArtifact, figure="", model=model, tokenizer_files=(), source="tiny", revision=None)

    spec = DownloadModelSpec(workspace=str(workspace), model=ModelSettings(source="tiny", allow_pickle=pickled))
    artifact = runtime.execute(spec, run)
    assert isinstance(artifact, a.ModelArtifact)
    return artifact


def make_checkpoint(
    workspace: Path, masters: Mapping[str, Tensor], *, layout: Layout, hf: Mapping[str, Any] = HF, dtype: str = "bfloat16"
) -> a.CheckpointArtifact:
    """What train leaves after two steps: masters and moments, cut over all ranks."""
    config = families.config_from_hf(hf)
    specs = families.tensors(config)

    def run(spec: TrainSpec, ctx: Context) -> a.CheckpointArtifact:
        folder = ctx.scratch / "checkpoints" / "step-000002"
        folder.mkdir(parents=True)
        for rank in range(layout.world_size):
            pp_rank, dp_rank, tp_rank = layout.coordinates(rank)
            pieces = []
            for tensor in specs:
                piece = rank_slices(specs, config.num_hidden_layers, layout, rank).get(tensor.name)
                if piece is None or replica(tensor, layout, pp_rank, tp_rank) > 0:
                    continue
                start, stop = dp_rows(piece[0][1] - piece[0][0], layout.dp, dp_rank)
                own = ((piece[0][0] + start, piece[0][0] + stop), *piece[1:])
                values = masters[tensor.name][tuple(slice(*bounds) for bounds in own)]
                pieces.append((tensor.name, tensor.shape, own, values))
                pieces.append((f"exp_avg.{tensor.name}", tensor.shape, own, values * 0.1))
            write_rank_file(folder, rank, pieces)
        write_index(folder, layout=asdict(layout), step=2)
        tokenizer = a.TokenizerFacts(kind="sentencepiece", vocab_size=300, eod_id=2, bos_id=1, fingerprint="0")
        return ctx.artifact(
            a.CheckpointArtifact, figure="", model=facts(config, dtype), tokenizer=tokenizer,
            checkpoint="checkpoints/step-000002", step=2, consumed_samples=16, consumed_tokens=256,
            tp=layout.tp, pp=layout.pp, dp=layout.dp, loss_before=5.0, loss_after=4.0,
        )  # fmt: skip

    settings = TrainSettings(steps=2)
    artifact = runtime.execute(TrainSpec(workspace=str(workspace), layout=LayoutSettings(), settings=settings), run)
    assert isinstance(artifact, a.CheckpointArtifact)
    return artifact
