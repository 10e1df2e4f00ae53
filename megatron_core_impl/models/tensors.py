"""Every tensor of a model: its canonical name, its global shape, and how a layout cuts it. No torch in here.

Canonical names are those that Hugging Face gives a Llama model, for every family, and tensors are never fused: a checkpoint of
ours looks the same whatever the model is called elsewhere.
"""

from collections.abc import Iterator
from math import prod

from megatron_core_impl.config import Heads, ModelConfig, TensorSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
HEAD = "lm_head.weight"


def tensors(config: ModelConfig) -> list[TensorSpec]:
    """All tensors of a model, in the order of the forward pass. A tied output layer has no tensor of its own."""
    vocabulary = (config.vocab_size, config.hidden_size)
    is_tied = config.tie_word_embeddings
    return [
        TensorSpec(name=EMBEDDING, shape=vocabulary, tp_dim=0, place="ends" if is_tied else "first", padded=True),
        *(spec for layer in range(config.num_hidden_layers) for spec in _layer(config, layer)),
        *(
            TensorSpec(name=f"{FINAL_NORM}.{part}", shape=(config.hidden_size,), tp_dim=None, place="last")
            for part in _norm_parts(config)
        ),
        *([] if is_tied else [TensorSpec(name=HEAD, shape=vocabulary, tp_dim=0, place="last", padded=True)]),
    ]


def count_parameters(config: ModelConfig) -> int:
    """Numbers that a model stores; a tied output layer counts once."""
    return sum(prod(spec.shape) for spec in tensors(config))


def norms_of_a_layer(config: ModelConfig) -> list[str]:
    """The names of a layer's norms, in the order of the forward pass."""
    if not config.is_parallel:
        return ["input_layernorm", "post_attention_layernorm"]
    return ["input_layernorm"] if config.has_shared_norm else ["input_layernorm", "mlp_layernorm"]


def _norm_parts(config: ModelConfig) -> tuple[str, ...]:
    return ("weight",) if config.norm == "rmsnorm" else ("weight", "bias")


def _layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    hidden, ffn = config.hidden_size, config.intermediate_size

    def spec(name: str, shape: tuple[int, ...], tp_dim: int | None, heads: Heads | None = None) -> TensorSpec:
        return TensorSpec(
            name=f"model.layers.{layer}.{name}", shape=shape, tp_dim=tp_dim, place="layer", layer=layer, heads=heads
        )

    def heads(is_kv: bool, is_rotated: bool = False) -> tuple[int, Heads]:
        number = config.num_key_value_heads if is_kv else config.num_attention_heads
        cut = Heads(
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim, is_kv=is_kv, is_rotated=is_rotated,
        )  # fmt: skip
        return number * config.head_dim, cut

    def norm(name: str) -> Iterator[TensorSpec]:
        return (spec(f"{name}.{part}", (hidden,), None) for part in _norm_parts(config))

    first, *second = norms_of_a_layer(config)
    yield from norm(first)
    for name, is_kv, is_rotated in (("q_proj", False, True), ("k_proj", True, True), ("v_proj", True, False)):
        rows, cut = heads(is_kv, is_rotated)
        yield spec(f"self_attn.{name}.weight", (rows, hidden), 0, cut)
        if config.qkv_bias:
            yield spec(f"self_attn.{name}.bias", (rows,), 0, cut)
    columns, cut = heads(is_kv=False)
    yield spec("self_attn.o_proj.weight", (hidden, columns), 1, cut)
    if config.o_bias:
        yield spec("self_attn.o_proj.bias", (hidden,), None)
    for name in second:
        yield from norm(name)
    for name in ("gate_proj", "up_proj") if config.is_gated else ("up_proj",):
        yield spec(f"mlp.{name}.weight", (ffn, hidden), 0)
        if config.mlp_bias:
            yield spec(f"mlp.{name}.bias", (ffn,), 0)
    yield spec("mlp.down_proj.weight", (hidden, ffn), 1)
    if config.mlp_bias:
        yield spec("mlp.down_proj.bias", (hidden,), None)
