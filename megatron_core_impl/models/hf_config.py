"""What the families share: reading a `config.json`, field by field. No torch in here.

Any version of transformers may have written the file: 4.x writes `rope_theta` and `rope_scaling`, 5.x `rope_parameters`. Fields
that transformers fills in when absent are filled in with the same values. All functions raise ValueError where a field is
missing, malformed, or asks for something that is not built; the message names the field.
"""

from collections.abc import Mapping
from typing import Any

from megatron_core_impl.config import Activation, RopeScaling, is_finite
from megatron_core_impl.shown import shown

HF = Mapping[str, Any]  # a parsed config.json

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
LLAMA_FIELDS = {  # ModelConfig's word -> config.json's, where they differ
    "norm_eps": "rms_norm_eps", "activation": "hidden_act", "qkv_bias": "attention_bias", "o_bias": "attention_bias",
    "rope_scaling": "rope_parameters",
}  # fmt: skip

# What the refused kinds of rotary embeddings do, and what can be done instead
_REFUSED_ROPE = {
    "dynamic": "its frequencies follow the length of each text, so training at one length is not training for another. "
    "Up to max_position_embeddings it changes nothing: set it to null to train there, or choose a model with linear or llama3 "
    "scaling",
    "yarn": "it scales the attention scores as well. If it was only added for long texts at inference, set it to null and "
    "train at the original length; else choose a model with linear or llama3 scaling",
    "longrope": "it changes its frequencies with the length of each text. Choose a model with linear or llama3 scaling",
}


def llama_fields(hf: HF, *, num_key_value_heads: int | None, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of ModelConfig that all Llama-like families write in the same words.

    Args:
        hf: the parsed config.json.
        num_key_value_heads: the family's value where the field is absent; None: as many as there are query heads.
        max_position_embeddings: the family's value where the field is absent.
    """
    refuse_what_is_never_built(hf)
    hidden_size, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    if hf.get("head_dim") is None:
        if hidden_size % heads:
            raise ValueError(
                f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden_size}, and no head_dim is given"
            )
        head_dim = hidden_size // heads
    else:
        head_dim = size(hf, "head_dim")
    kv_heads = hf.get("num_key_value_heads", num_key_value_heads)
    theta, scaling = rope(hf, max_position_embeddings)
    return {
        "vocab_size": size(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(hf, "intermediate_size"),
        "num_hidden_layers": size(hf, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else size({"num_key_value_heads": kv_heads}, "num_key_value_heads"),
        "head_dim": head_dim,
        "max_position_embeddings": size(hf, "max_position_embeddings", max_position_embeddings),
        "norm_eps": number(hf, "rms_norm_eps", 1e-6),
        "activation": activation(hf, "hidden_act", "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", False),
    }


def refuse_what_is_never_built(hf: HF) -> None:
    if hf.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported. Start from the model's unquantized weights")
    for name in ("attention_dropout", "hidden_dropout"):
        if (value := hf.get(name)) not in (None, 0):
            raise ValueError(
                f"config.json: {name}={shown(value)} is not supported: dropout is a setting of the training, not of the model. "
                f"Set {name} to 0.0 there"
            )
    if (share := hf.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor={shown(share)} is not supported; only 1.0 is")


def size(hf: HF, name: str, default: int | None = None, *, at_least: int = 1) -> int:
    """A whole number, which must be there unless it has a default."""
    if (value := hf.get(name, default)) is None:
        raise ValueError(f"config.json: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={shown(value)} must be a whole number")
    if value < at_least:
        raise ValueError(f"config.json: {name}={shown(value)} must be at least {at_least}")
    return value


def number(hf: HF, name: str, default: float | None = None, *, where: str = "config.json") -> float:
    """A finite number, which must be there unless it has a default. (Python's JSON knows NaN and Infinity.)"""
    if (value := hf.get(name, default)) is None:
        raise ValueError(f"{where}: {name} is missing")
    if not is_finite(value):
        raise ValueError(f"{where}: {name}={shown(value)} must be a finite number")
    return float(value)


def flag(hf: HF, name: str, default: bool) -> bool:
    """True or false; null is false, as it is to transformers."""
    if not isinstance(value := hf.get(name, default), bool | None):
        raise ValueError(f"config.json: {name}={shown(value)} must be true or false")
    return bool(value)


def activation(hf: HF, name: str, default: str) -> Activation:
    """An activation function, by transformers' name for it."""
    if not isinstance(value := hf.get(name, default), str) or value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name}={shown(value)} is not supported. Supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def rope(hf: HF, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either spelling; `rope_scaling` wins, as it does in transformers."""
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    parameters = hf.get(field) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: {field}={shown(parameters)} must be an object")
    refuse_what_is_never_built({"partial_rotary_factor": parameters.get("partial_rotary_factor")})
    where = f"config.json: {field}"
    theta = number(parameters if parameters.get("rope_theta") is not None else hf, "rope_theta", 10000.0, where="config.json")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=number(parameters, "factor", where=where))
    if kind == "llama3":
        name = "original_max_position_embeddings"
        context = {name: hf.get(name) or parameters.get(name) or hf.get("max_position_embeddings")}
        return theta, RopeScaling(
            kind="llama3",
            factor=number(parameters, "factor", where=where),
            low_freq_factor=number(parameters, "low_freq_factor", where=where),
            high_freq_factor=number(parameters, "high_freq_factor", where=where),
            original_max_position_embeddings=size(context, name, max_position_embeddings),
        )
    reason = _REFUSED_ROPE.get(kind if isinstance(kind, str) else "", "supported are default, linear and llama3")
    raise ValueError(f"config.json: rope_type={shown(kind)} of {field} is not supported: {reason}")
