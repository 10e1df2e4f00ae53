"""Tiny random models of transformers, the kinds of every family, and ours with the same weights."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_core_impl.checkpoint.dtypes import Bytes, Dtype, as_bytes, dtype_of
from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.safetensors_io import check_slice
from megatron_core_impl.checkpoint.slicing import Slice, whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize

VOCAB = 131
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
_LLAMA = _COMMON | {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
_FALCON = _COMMON | {"model_type": "falcon", "num_attention_heads": 6}
KINDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"model_type": "llama", "num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "codellama": _LLAMA | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama-head-dim-tied": _LLAMA | {"model_type": "llama", "head_dim": 24, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "llama-biases-gelu": _LLAMA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-relu": _LLAMA | {"model_type": "llama", "hidden_act": "relu"},
    "llama-linear": _LLAMA
    | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": _LLAMA
    | {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": _LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "mistral-no-window": _LLAMA | {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": _LLAMA | {"model_type": "qwen2"},
    "qwen2-window-tied": _LLAMA
    | {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
        "tie_word_embeddings": True,
    },
    "falcon-7b": _FALCON,
    "falcon-7b-prime": _FALCON | {"num_attention_heads": 7, "hidden_size": 56, "activation": "gelu_pytorch_tanh"},
    "falcon-40b": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 72},
    "falcon-11b": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    "falcon-sequential": _FALCON | {"parallel_attn": False, "multi_query": False, "tie_word_embeddings": False, "bias": True},
}  # fmt: skip


def random_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of transformers whose weights are large enough for everything to matter."""
    fields = KINDS[kind] | changes
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(float(is_norm) + 0.15 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(model, PreTrainedModel)
    return model


def described(model: PreTrainedModel) -> ModelConfig:
    """Our description of a model, from the config.json that transformers writes."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return families.config_from_hf(json.loads((Path(folder) / "config.json").read_text()))


class InMemory(WeightsSource):
    """Tensors by name as a source of weights."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def folder(self) -> Path:
        return Path("memory")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> Dtype:
        return dtype_of(self.tensors[name].dtype)

    def check(self, name: str, piece: Slice) -> None:
        check_slice(f"memory: {name}", self.shape(name), piece)

    def read_bytes(self, name: str, piece: Slice | None = None) -> Bytes:
        tensor = self.tensors[name]
        ranges = whole(tensor.shape) if piece is None else piece
        return as_bytes(tensor[tuple(slice(*bounds) for bounds in ranges)])


def ours_of(theirs: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model with the weights of one of transformers'."""
    config = described(theirs)
    ours = parallelize(config, Mesh.single(), dtype=dtype)
    load_weights(ours, Rearranged(InMemory(theirs.state_dict()), invert(families.family_of(config).hf_tensors(config))))
    return ours.eval()


def logits_of(ours: Transformer, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """[B, S, V], without the padding of the vocabulary."""
    logits: Tensor = ours(tokens, position_ids)
    return logits[:, : ours.config.vocab_size].view(*tokens.shape, -1)
