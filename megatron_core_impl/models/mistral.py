"""The Mistral family: Llama with a sliding window (https://arxiv.org/abs/2310.06825). No torch in here."""

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.hf_config import HF, llama_fields, size


def config_from_hf(hf: HF) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes. `sliding_window: null` is no window, a missing one 4096.

    Raises:
        ValueError: a field is missing, or asks for something that is not built; the message names the field.
    """
    has_window = hf.get("sliding_window", 4096) is not None
    return ModelConfig(
        family="mistral",
        sliding_window=size(hf, "sliding_window", 4096) if has_window else None,
        **llama_fields(hf, num_key_value_heads=8, max_position_embeddings=131072),
    )
