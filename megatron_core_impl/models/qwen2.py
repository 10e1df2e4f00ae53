"""The Qwen2 family (Qwen2, Qwen2.5): Llama with biases on q, k and v (https://arxiv.org/abs/2407.10671). No torch in here."""

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.hf_config import HF, flag, llama_fields, size
from megatron_core_impl.shown import shown


def config_from_hf(hf: HF) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
        ValueError: a field is missing, or asks for something that is not built; the message names the field.
    """
    fields = llama_fields(hf, num_key_value_heads=32, max_position_embeddings=32768)
    return ModelConfig(family="qwen2", qkv_bias=True, sliding_window=_window(hf, fields["num_hidden_layers"]), **fields)


def _window(hf: HF, num_layers: int) -> int | None:
    """The window of all layers. Layers from max_window_layers on have one, or those that layer_types says."""
    if not flag(hf, "use_sliding_window", False) or hf.get("sliding_window", 4096) is None:
        return None
    first = size(hf, "max_window_layers", 28, at_least=0)
    kinds = hf.get("layer_types") or ["sliding_attention" if n >= first else "full_attention" for n in (0, num_layers - 1)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"config.json: layer_types={shown(kinds)} must be a list of names")
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise ValueError(
            f"config.json: use_sliding_window with max_window_layers={first} gives only some of num_hidden_layers={num_layers} "
            "a window, which is not supported. Set use_sliding_window to false to train within sliding_window tokens"
        )
    return size(hf, "sliding_window", 4096)
