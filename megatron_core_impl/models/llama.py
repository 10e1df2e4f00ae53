"""The Llama family (Llama, Llama 2, Code Llama): its configuration and its tensors. No torch in here.

Canonical names are those of Hugging Face, so its table of tensors is also the list of what a checkpoint holds.
"""

from collections.abc import Mapping
from typing import Any

from megatron_core_impl.config import ModelConfig, TensorSpec

FAMILY = "llama"
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# config.json fields that change the arithmetic, and the only value that is built here
_ONLY: dict[str, object] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Args:
        hf: the parsed file, as written by any transformers version: 4.x writes `rope_theta` and `rope_scaling`, 5.x
            `rope_parameters`. Fields that transformers fills in when absent are filled in with the same values.

    Raises:
        ValueError: a field is missing, or asks for something that is not built; the message names the field.
    """
    for name, only in _ONLY.items():
        if (value := hf.get(name, only)) != only:
            raise ValueError(f"config.json: {name}={value!r} is not supported; only {name}={only!r} is")
    if hf.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported. Start from the model's unquantized weights")
    heads = _size(hf, "num_attention_heads")
    hidden_size = _size(hf, "hidden_size")
    head_dim = hf.get("head_dim")
    if head_dim is None and hidden_size % heads:
        raise ValueError(
            f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden_size}, and no head_dim is given"
        )
    kv_heads = hf.get("num_key_value_heads")
    return ModelConfig(
        family=FAMILY,
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(hf, "intermediate_size"),
        num_hidden_layers=_size(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden_size // heads if head_dim is None else head_dim,
        max_position_embeddings=_size({"max_position_embeddings": 2048} | dict(hf), "max_position_embeddings"),
        rms_norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(hf),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model, in the order of the forward pass. A tied output layer has no tensor of its own."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    in_layer: dict[str, tuple[tuple[int, ...], int | None]] = {  # name -> shape, dim that is cut over tp
        "input_layernorm": ((hidden,), None),
        "self_attn.q_proj": ((queries, hidden), 0),
        "self_attn.k_proj": ((keys, hidden), 0),
        "self_attn.v_proj": ((keys, hidden), 0),
        "self_attn.o_proj": ((hidden, queries), 1),
        "post_attention_layernorm": ((hidden,), None),
        "mlp.gate_proj": ((ffn, hidden), 0),
        "mlp.up_proj": ((ffn, hidden), 0),
        "mlp.down_proj": ((hidden, ffn), 1),
    }
    vocabulary = (config.vocab_size, hidden)
    return [
        TensorSpec(name=EMBEDDING, shape=vocabulary, tp_dim=0, place="first", padded=True),
        *(
            TensorSpec(name=f"model.layers.{layer}.{name}.weight", shape=shape, tp_dim=tp_dim, place="layer", layer=layer)
            for layer in range(config.num_hidden_layers)
            for name, (shape, tp_dim) in in_layer.items()
        ),
        TensorSpec(name=FINAL_NORM, shape=(hidden,), tp_dim=None, place="last"),
        *(
            [TensorSpec(name=HEAD, shape=vocabulary, tp_dim=0, place="last", padded=True)]
            if not config.tie_word_embeddings
            else []
        ),
    ]


def _size(hf: Mapping[str, Any], name: str) -> int:
    if (value := hf.get(name)) is None:
        raise ValueError(f"config.json: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} must be a whole number")
    return value


def _number(hf: Mapping[str, Any], name: str, default: float) -> float:
    if not isinstance(value := hf.get(name, default), int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} must be a number")
    return float(value)


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, from either spelling; refuses every variant that is not the plain one."""
    for field in ("rope_parameters", "rope_scaling"):
        rope = hf.get(field) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json: {field}={rope!r} must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config.json: {field}={rope!r} is not supported; only plain rotary embeddings (rope_type default) are"
            )
    theta = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta"))
    return _number({} if theta is None else {"rope_theta": theta}, "rope_theta", 10000.0)
