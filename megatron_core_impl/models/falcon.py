"""The Falcon family (https://arxiv.org/abs/2311.16867): the 7B style, multi-query with one norm, and the 40B style, grouped
queries with a norm each for attention and MLP. No torch in here.
"""

from dataclasses import replace

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.forms import Form
from megatron_core_impl.models.hf_config import HF, activation, flag, number, refuse_what_is_never_built, rope, size

FIELDS = {  # ModelConfig's word -> config.json's, where they differ
    "intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads", "norm_eps": "layer_norm_epsilon",
    "qkv_bias": "bias", "o_bias": "bias", "mlp_bias": "bias", "is_parallel": "parallel_attn",
    "has_shared_norm": "num_ln_in_parallel_attn", "rope_scaling": "rope_parameters",
}  # fmt: skip

_FORM = Form(
    words={
        "model": "transformer", "embed_tokens": "word_embeddings", "layers": "h", "norm": "ln_f", "self_attn": "self_attention",
        "o_proj": "dense", "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h",
    },
    fused={"query_key_value": ("q_proj", "k_proj", "v_proj")},
)  # fmt: skip
_TWO_NORMS = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"}


def config_from_hf(hf: HF) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
        ValueError: a field is missing, or asks for something that is not built; the message names the field.
    """
    refuse_what_is_never_built(hf)
    if flag(hf, "alibi", False):
        raise ValueError("config.json: alibi=True is not supported, rotary embeddings are. Choose a Falcon model with them")
    hidden_size, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    if hidden_size % heads:
        raise ValueError(f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden_size}")
    is_new, is_parallel = flag(hf, "new_decoder_architecture", False), flag(hf, "parallel_attn", True)
    if is_new and not is_parallel:  # transformers makes such a model, and then cannot run it
        raise ValueError(
            "config.json: parallel_attn=False is not supported where new_decoder_architecture is true; set it to true"
        )
    bias = flag(hf, "bias", False)
    theta, scaling = rope(hf, 2048)
    return ModelConfig(
        family="falcon",
        vocab_size=size(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size if hf.get("ffn_hidden_size") is None else size(hf, "ffn_hidden_size"),
        num_hidden_layers=size(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(hf, heads, is_new),
        head_dim=hidden_size // heads,
        max_position_embeddings=size(hf, "max_position_embeddings", 2048),
        norm="layernorm",
        norm_eps=number(hf, "layer_norm_epsilon", 1e-5),
        activation=activation(hf, "activation", "gelu"),
        is_gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        is_parallel=is_parallel,
        has_shared_norm=is_parallel and _num_norms(hf, is_new) == 1,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=flag(hf, "tie_word_embeddings", True),
    )


def hf_name(name: str) -> str:
    """Falcon's name of a module with a canonical one."""
    return _FORM.name(name)


def hf_form(config: ModelConfig) -> Form:
    """How Hugging Face stores a Falcon: q, k and v as one tensor, of 7B all query heads, then the key and the value head."""
    has_two_norms = config.is_parallel and not config.has_shared_norm
    return replace(_FORM, words={**_FORM.words, **_TWO_NORMS}) if has_two_norms else _FORM


def _kv_heads(hf: HF, heads: int, is_new: bool) -> int:
    """Key/value heads: num_kv_heads counts in the new architecture only, before that there is one, or one per query head."""
    if not is_new and flag(hf, "multi_query", True):
        return 1
    kv_heads = heads if hf.get("num_kv_heads") is None else size(hf, "num_kv_heads")
    if not is_new and kv_heads != heads:
        raise ValueError(
            f"config.json: num_kv_heads={kv_heads} without multi_query and new_decoder_architecture must be "
            f"num_attention_heads={heads}"
        )
    return kv_heads


def _num_norms(hf: HF, is_new: bool) -> int:
    """Norms in front of attention and MLP side by side: one shared, or, only in the new architecture, one each."""
    default = 2 if is_new else 1
    norms = default if hf.get("num_ln_in_parallel_attn") is None else size(hf, "num_ln_in_parallel_attn")
    if norms > default:
        legal = "1 or 2" if is_new else "1 without new_decoder_architecture"
        raise ValueError(f"config.json: num_ln_in_parallel_attn={norms} is not supported; it must be {legal}")
    return norms
