"""The Llama family: Llama, Llama 2, Code Llama, Llama 3. No torch in here."""

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.hf_config import HF, flag, llama_fields


def config_from_hf(hf: HF) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
        ValueError: a field is missing, or asks for something that is not built; the message names the field.
    """
    has_attention_bias = flag(hf, "attention_bias", False)
    return ModelConfig(
        family="llama",
        qkv_bias=has_attention_bias,
        o_bias=has_attention_bias,
        mlp_bias=flag(hf, "mlp_bias", False),
        **llama_fields(hf, num_key_value_heads=None, max_position_embeddings=2048),
    )
