"""Model and layout, described by frozen dataclasses that are validated once, when they are made. No torch in here.

Words are those of Hugging Face configurations. A mesh has *axes* (pp, dp, tp), a tensor has *dims*.
"""

import math
from dataclasses import dataclass, fields
from sys import float_info
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rmsnorm", "layernorm"]
# What computes attention: see layers.attention
Kernel = Literal["flash-attn", "varlen", "sdpa"]
# What rows of added tokens begin as: see checkpoint.grown
NewRows = Literal["mean", "zeros", "last", "normal"]
Range = tuple[int, int]  # half-open
MOST_LAYERS = 10_000  # a model of more is a damaged config.json, and takes hours to list


def check_choices(settings: "DataclassInstance", *, where: str = "") -> None:
    """Refuse values of fields of a Literal type that are none of its values.

    Args:
        where: comes before the name of the field in the message.

    Raises:
        ValueError: naming the field and the legal values.
    """
    for field in fields(settings):
        if get_origin(field.type) is Literal and (value := getattr(settings, field.name)) not in (
            legal := get_args(field.type)
        ):
            raise ValueError(f"{where}{field.name}={value!r} is not supported. Legal here: {', '.join(legal)}")


def check_numbers(
    settings: "DataclassInstance", *names: str,
    at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf, where: str = "",
) -> None:  # fmt: skip
    """Refuse fields that are no finite numbers, or none of this range. A field of type int must be whole; None is left alone.

    Args:
        where: comes before the name of the field in the message.

    Raises:
        ValueError: naming the field and the range.
    """
    types = {field.name: field.type for field in fields(settings)}
    limits = [f"{word} {limit}" for word, limit in (("at least", at_least), ("above", above)) if limit > -math.inf]
    limits += [f"less than {below}"] if below < math.inf else []
    for name in names:
        if (value := getattr(settings, name)) is None:
            continue
        if types[name] in (int, int | None) and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{where}{name}={value!r} must be a whole number")
        if not is_finite(value):
            raise ValueError(f"{where}{name}={value!r} must be a finite number")
        if value < at_least or value <= above or value >= below:
            raise ValueError(f"{where}{name}={value!r} must be {' and '.join(limits)}")


def is_finite(value: Any) -> bool:
    """Whether this is a number that a float can hold: not NaN, not infinite, and no integer beyond."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary embeddings reach beyond the positions that a model was first trained on.

    `linear` divides positions by `factor` (https://arxiv.org/abs/2306.15595). `llama3` divides the slow frequencies only: those
    whose wavelength exceeds original / low_freq_factor; those below original / high_freq_factor stay, and in between it blends.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # of llama3, as the two that follow
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        where = "rope_scaling: "
        check_choices(self, where=where)
        check_numbers(self, "factor", "original_max_position_embeddings", at_least=1, where=where)
        check_numbers(self, "low_freq_factor", "high_freq_factor", where=where)
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be positive and less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


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
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Activation = "silu"  # gelu is the exact one, by the error function
    is_gated: bool = True  # act(gate) · up (SwiGLU, GeGLU, ReGLU), or plain act(up)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    is_parallel: bool = False  # attention and MLP both read the layer's input: x + attention(norm(x)) + mlp(norm(x))
    has_shared_norm: bool = False  # parallel: one norm for both, else one each
    sliding_window: int | None = None  # keys that a query sees, itself included; None: all before it
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", at_least=1,
        )  # fmt: skip
        check_numbers(self, "norm_eps", "rope_theta", above=0)
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is impossible: at most {MOST_LAYERS:,}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of numbers")
        if self.has_shared_norm and not self.is_parallel:
            raise ValueError(
                "has_shared_norm=True needs is_parallel=True: one after the other, attention and MLP read two inputs"
            )


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What is zeroed at random while training: shares of numbers, the rest scaled up. Not part of a model's function."""

    hidden: float = 0.0  # of the embeddings, and of what attention and MLP add to the residual stream
    attention: float = 0.0  # of the attention weights
    lima: bool = (
        False  # hidden grows linearly from 0 in the first layer to its value in the last (https://arxiv.org/abs/2305.11206)
    )

    def __post_init__(self) -> None:
        for name in ("hidden", "attention"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}_dropout={getattr(self, name)} must be at least 0 and less than 1")
        if self.lima and not self.hidden:
            raise ValueError("lima_dropout=True needs hidden_dropout above 0: the share of the last layer")

    def of_layer(self, layer: int, num_layers: int) -> float:
        """The share of a layer's hidden states."""
        return self.hidden * layer / max(1, num_layers - 1) if self.lima else self.hidden

    @property
    def of_embeddings(self) -> float:
        return 0.0 if self.lima else self.hidden

    @property
    def is_active(self) -> bool:
        return self.hidden > 0 or self.attention > 0


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which activations are computed again in the backward pass instead of being kept (https://arxiv.org/abs/2205.05198)."""

    mode: Literal["none", "selective", "full"] = "none"  # selective: what is large and cheap; full: everything inside a unit
    layers_per_unit: int = 1  # full: layers between two kept activations

    def __post_init__(self) -> None:
        check_choices(self, where="recompute: ")
        check_numbers(self, "layers_per_unit", at_least=1)
        if self.mode != "full" and self.layers_per_unit != 1:
            raise ValueError(f"layers_per_unit={self.layers_per_unit} is of recompute mode full; here it is {self.mode}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks each mesh axis has. Ranks are numbered tp fastest, then dp, then pp, as Megatron numbers them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1  # virtual pp stages per rank: chunks of layers that a rank holds, for the interleaved schedule

    def __post_init__(self) -> None:
        check_numbers(self, "tp", "pp", "dp", "vpp", at_least=1)
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp of at least 2: virtual stages shorten the bubble of a pipeline")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp_rank, dp_rank, tp_rank) of a global rank."""
        rest, tp_rank = divmod(rank, self.tp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return pp_rank, dp_rank, tp_rank

    def kv_replicas(self, config: ModelConfig) -> int:
        """Neighbouring tp ranks that hold the same key/value head: 1 unless tp exceeds their number."""
        return max(1, self.tp // config.num_key_value_heads)

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout that cannot hold this model, naming the legal values.

        Raises:
            ValueError: tp cannot share out the heads or the feed-forward width, or pp × vpp exceeds the layers.
        """
        if not _is_legal_tp(config, self.tp):
            legal = ", ".join(str(n) for n in range(1, config.num_attention_heads + 1) if _is_legal_tp(config, n))
            raise ValueError(
                f"tp={self.tp} cannot share out num_attention_heads={config.num_attention_heads} with "
                f"num_key_value_heads={config.num_key_value_heads} and intermediate_size={config.intermediate_size}. "
                f"Legal here: {legal}"
            )
        layers = config.num_hidden_layers
        if self.pp > layers:
            raise ValueError(f"pp={self.pp} exceeds num_hidden_layers={layers}. Legal here: 1 to {layers}")
        if self.pp * self.vpp > layers:
            raise ValueError(
                f"pp={self.pp} × vpp={self.vpp} exceeds num_hidden_layers={layers}. Legal vpp here: 1 to {layers // self.pp}"
            )


def _is_legal_tp(config: ModelConfig, tp: int) -> bool:
    """Whether every tp rank gets whole key/value heads, or a part of the query heads of one, and an equal part of the MLP."""
    kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
    return config.intermediate_size % tp == 0 and (kv_heads % tp == 0 or (tp % kv_heads == 0 and tp <= heads))


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A dim made of attention heads, and which of them a tp rank holds.

    Up to tp = num_key_value_heads every rank holds as many key/value heads, and the query heads that look at them. Beyond, a
    key/value head lies on tp / num_key_value_heads neighbouring ranks, and these share its query heads out, the first ranks
    one more where it does not come out even: 71 heads on 2 ranks are 36 and 35.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    is_kv: bool  # the dim holds key/value heads, not query heads
    is_rotated: bool = False  # rotary embeddings turn pairs of each head's numbers: the first half with the second

    def range(self, tp: int, tp_rank: int) -> Range:
        """The part of the dim that a rank holds."""
        per_kv = self.num_attention_heads // self.num_key_value_heads
        if tp <= self.num_key_value_heads:
            kv_heads = self.num_key_value_heads // tp
            first, last = tp_rank * kv_heads, (tp_rank + 1) * kv_heads
            heads = (first, last) if self.is_kv else (first * per_kv, last * per_kv)
        else:
            kv_head, part = divmod(tp_rank, tp // self.num_key_value_heads)
            start, stop = balanced(per_kv, tp // self.num_key_value_heads, part)
            heads = (kv_head, kv_head + 1) if self.is_kv else (kv_head * per_kv + start, kv_head * per_kv + stop)
        return heads[0] * self.head_dim, heads[1] * self.head_dim

    def replica(self, tp: int, tp_rank: int) -> int:
        """Which of the ranks that hold the same part this one is; 0 where nobody else does."""
        return tp_rank % max(1, tp // self.num_key_value_heads) if self.is_kv else 0


def balanced(total: int, parts: int, part: int) -> Range:
    """The range of one of `parts` contiguous parts of `total` things: the first parts one longer where it is not even."""
    block, longer = divmod(total, parts)
    start = part * block + min(part, longer)
    return start, start + block + (part < longer)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One canonical tensor of a model: its name, its global shape and how a layout cuts it.

    A model's list of these (`models.families.tensors`) is all that checkpoints know of it.
    """

    name: str
    shape: tuple[int, ...]  # global; dim 0 of an embedding is the true vocabulary
    tp_dim: int | None  # the dim that is cut over tp; None: every tp rank holds the whole tensor
    place: Literal["first", "layer", "last", "ends"]  # which pp stage holds it: first, its layer's, last, both first and last
    layer: int = 0  # number of the transformer layer, where place == "layer"
    padded: bool = False  # dim 0 is the vocabulary: cut as if padded to the layout's need, stored without padding
    heads: Heads | None = None  # tp_dim is made of attention heads


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: start … stop-1 of its dim 0, in order or transposed.

    `transposed` (a, b) takes a·b rows at a time as a matrix of a × b rows, and its transpose b × a. (2, d/2) interleaves the
    two halves of a head of d rows, 0 d/2 1 d/2+1 …; (d/2, 2) undoes that.
    """

    tensor: str
    start: int
    stop: int
    transposed: tuple[int, int] | None = None


@dataclass(frozen=True)
class StackedTensor:
    """A tensor of one layout as rows of the tensors of another, one below the other.

    How a foreign checkpoint stores a model is a list of these, made of canonical tensors. Turned round
    (`checkpoint.foreign.invert`) the same list tells where in it each canonical tensor lies.
    """

    name: str
    parts: tuple[Rows, ...]


@dataclass(frozen=True)
class RankForm:
    """What one rank of another system stores of a model: slices of the canonical tensors, put together by its table."""

    pieces: dict[str, tuple[Range, ...]]  # of each canonical tensor that it holds
    table: tuple[StackedTensor, ...]  # its tensors, as rows of these slices
    counted: frozenset[str]  # the canonical tensors whose slice counts as this rank's, where several hold the same


VOCAB_MULTIPLE = 128  # rows per tp rank are a multiple of this: GEMMs of the output layer like it (Megatron's default)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The smallest multiple of 128·tp that holds `vocab_size` rows (golden fact G16)."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
