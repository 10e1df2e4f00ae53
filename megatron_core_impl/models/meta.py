"""Meta's form of a Llama: names, and what `params.json` says. No torch in here.

params.json lacks what follows from the weights (the feed-forward width, often the vocabulary), and the longest position that
the model was trained for: that the person gives (`model.config`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_core_impl.config import Layout, ModelConfig, RankForm
from megatron_core_impl.models.forms import Form, evenly_cut, rank_form
from megatron_core_impl.models.tensors import EMBEDDING
from megatron_core_impl.shown import shown

FORM = Form(
    words={
        "model": "", "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention", "q_proj": "wq",
        "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2",
        "up_proj": "w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    },
    is_interleaved=True,
)  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"layers\.(\d+)\.")
# Fields that say what the weights say, too, or nothing of the model
_IDLE = {"multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size", "model_parallel_size"}
_READ = {"dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len"}


def hf_from_params(params: Mapping[str, Any], shapes: Shapes, num_shards: int) -> dict[str, Any]:
    """The config.json of the model that params.json describes. What it does not tell is None: see `check_said`.

    Args:
        shapes: of the tensors in the first file.
        num_shards: how many files there are.

    Raises:
        ValueError: a field is missing, unknown or not what the files hold; the message names it.
    """
    if unknown := params.keys() - _IDLE - _READ:
        raise ValueError(f"params.json: {min(unknown)[:100]} is not supported. Supported: {', '.join(sorted(_READ))}")
    sizes = {name: _count(params, name) for name in ("dim", "n_layers", "n_heads")}
    kv_heads = sizes["n_heads"] if params.get("n_kv_heads") is None else _count(params, "n_kv_heads")
    _check_stored(params, sizes, shapes, num_shards)
    if kv_heads % num_shards:
        raise ValueError(f"params.json: n_kv_heads={kv_heads} cannot be shared out over {num_shards} files")
    output, first = _shape(shapes, "output.weight"), _shape(shapes, "layers.0.feed_forward.w1.weight")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": output[0] * num_shards,
        "hidden_size": sizes["dim"], "intermediate_size": first[0] * num_shards, "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"], "num_key_value_heads": kv_heads, "hidden_act": "silu",
        "max_position_embeddings": params.get("max_seq_len"), "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 1e4), "rope_scaling": None, "tie_word_embeddings": False,
    }  # fmt: skip


def check_said(params: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse params.json where the person (`model.config`) does not say what it leaves out.

    Raises:
        ValueError: naming what to set, and its value in the models that there are.
    """
    if params.get("use_scaled_rope") and "rope_scaling" not in said:
        raise ValueError(
            "params.json: use_scaled_rope does not say how: model.config.rope_scaling must, as the model's config.json on the "
            "Hub does. Llama 3.1: {rope_type: llama3, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
            "original_max_position_embeddings: 8192}"
        )
    if params.get("max_seq_len") is None and "max_position_embeddings" not in said:
        raise ValueError(
            "params.json does not say for how many positions the model was trained: set model.config.max_position_embeddings "
            "(Llama 1: 2048, Llama 2: 4096, Code Llama: 16384, Llama 3: 8192, Llama 3.1: 131072)"
        )


def stored_by(config: ModelConfig, rows: int, shapes: Shapes, num_shards: int, shard: int) -> RankForm:
    """What a file stores of a model whose vocabulary has `rows`.

    Llama 1 and 2 cut the embedding by columns, Llama 3 by rows, as the output layer: the file's own shape tells.
    """
    is_cut_by_columns = _shape(shapes, FORM.name(EMBEDDING))[-1] != config.hidden_size
    specs = [
        replace(spec, tp_dim=1) if spec.name == EMBEDDING and is_cut_by_columns else spec for spec in evenly_cut(config, rows)
    ]
    return rank_form(FORM, specs, Layout(tp=num_shards), 0, shard)


def _check_stored(params: Mapping[str, Any], sizes: Mapping[str, int], shapes: Shapes, num_shards: int) -> None:
    """Refuse sizes that the files contradict, and files of which others are missing."""
    dim, layers = sizes["dim"], len({found[1] for name in shapes if (found := _LAYER.match(name))})
    for field, held in (("n_layers", layers), ("dim", _shape(shapes, "norm.weight")[0])):
        if sizes[field] != held:
            raise ValueError(f"params.json: {field}={shown(sizes[field])}, and the files hold {held:,}")
    rows = _shape(shapes, "layers.0.attention.wq.weight")[0]
    if rows * num_shards != dim:
        whole = dim // rows if rows and dim % rows == 0 else 0
        needed = f"{whole} file{'s' if whole > 1 else ''}" if whole else "another number of files"
        raise ValueError(
            f"consolidated.00.pth holds {rows:,} of the {dim:,} rows of layers.0.attention.wq.weight (params.json: dim={dim}), "
            f"so the model is stored in {needed}, and there {'is' if num_shards == 1 else 'are'} {num_shards}: files "
            f"{'are missing' if rows * num_shards < dim else 'of another model are among them'}"
        )
    vocab_size, stored = params.get("vocab_size", -1), _shape(shapes, "output.weight")[0] * num_shards
    if vocab_size not in (None, -1, stored):
        raise ValueError(
            f"params.json: vocab_size={shown(vocab_size)}, and the files hold {stored:,} rows. If those are right, set it to -1"
        )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if not shapes.get(name):
        raise ValueError(f"the weights lack {name}, so they are not Meta's Llama")
    return shapes[name]


def _count(params: Mapping[str, Any], name: str) -> int:
    if type(value := params.get(name)) is not int or value < 1:
        raise ValueError(f"params.json: {name}={shown(value)} must be a count")
    return value
