"""Model and layout, described by frozen dataclasses that are validated once, when they are made. No torch in here.

Words are those of Hugging Face configurations. A mesh has *axes* (pp, dp, tp), a tensor has *dims*.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, in Hugging Face words.

    Raises ValueError, naming the fields, when the numbers do not fit together.
    """

    family: str  # which module of `models` maps its names, e.g. "llama"
    vocab_size: int  # the true vocabulary; padding is a run-time matter
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of numbers")
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} and rope_theta={self.rope_theta} must be positive")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks each mesh axis has. Ranks are numbered tp fastest, then dp, then pp, as Megatron numbers them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis}={getattr(self, axis)} must be at least 1")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp_rank, dp_rank, tp_rank) of a global rank."""
        rest, tp_rank = divmod(rank, self.tp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return pp_rank, dp_rank, tp_rank

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout that cannot hold this model, naming the legal values.

        Raises:
            ValueError: tp does not divide the heads or the feed-forward width, or pp exceeds the layers.
        """
        for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
            value = getattr(config, name)
            if value % self.tp:
                legal = ", ".join(str(n) for n in _common_divisors(config))
                raise ValueError(f"tp={self.tp} does not divide {name}={value}. Legal here: {legal}")
        if self.pp > config.num_hidden_layers:
            raise ValueError(
                f"pp={self.pp} exceeds num_hidden_layers={config.num_hidden_layers}. "
                f"Legal here: 1 to {config.num_hidden_layers}"
            )


def _common_divisors(config: ModelConfig) -> Iterable[int]:
    sizes = (config.num_key_value_heads, config.num_attention_heads, config.intermediate_size)
    return (n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One canonical tensor of a model: its Hugging Face name, its global shape and how a layout cuts it.

    A family's list of these (`models/<family>.py: tensors(config)`) is all that checkpoints know of a family.
    """

    name: str
    shape: tuple[int, ...]  # global; dim 0 of an embedding is the true vocabulary
    tp_dim: int | None  # the dim that is cut over tp; None: every tp rank holds the whole tensor
    place: Literal["first", "layer", "last"]  # which pp stage holds it: the first, its layer's, the last
    layer: int = 0  # number of the transformer layer, where place == "layer"
    padded: bool = False  # dim 0 is the vocabulary: cut as if padded to the layout's need, stored without padding


VOCAB_MULTIPLE = 128  # rows per tp rank are a multiple of this: GEMMs of the output layer like it (Megatron's default)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The smallest multiple of 128·tp that holds `vocab_size` rows (golden fact G16)."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
