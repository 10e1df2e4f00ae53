"""Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245), its heads cut over the tp group.

Letters: T tokens of this rank, B sequences of S tokens each (B·S = T·tp), H hidden, N query and K key/value heads of this rank,
D features per head. Query head n looks at key/value head n // (N/K). Both numbers follow from the rank's weights, as ranks may
differ by a head. The kernel is chosen in `choose_kernel` and nowhere else. Those made for attention neither repeat keys and
values for their query heads nor keep S × S numbers; PyTorch without one, as on a CPU under dropout, does both (`_sdpa`).
"""

import importlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.collectives import Group
from megatron_core_impl.config import Kernel, ModelConfig
from megatron_core_impl.layers.blocks import WINDOW_BLOCK, window_blocks
from megatron_core_impl.layers.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from megatron_core_impl.layers.parameter import ParameterFactory
from megatron_core_impl.layers.rope import Rotation, rotate

# flash-attn: the package of that name. varlen: PyTorch's for packed documents, windows. Both: CUDA, half precision.
# sdpa: PyTorch's scaled_dot_product_attention, everywhere: FlashAttention on CUDA in half precision, a blocked one on the CPU
# without dropout, and plain products and softmax where there is no such kernel.


@dataclass(frozen=True)
class Sequences:
    """How the tokens of a micro batch form sequences. Made once per micro batch, and used by all layers."""

    batch_size: int
    rotation: Rotation
    document_lengths: tuple[int, ...] | None = None  # of the B·S tokens: attention stays inside each. None: B documents of S
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def boundaries(self) -> Tensor:
        """Where documents start, and where the last one ends: int32, on the device of the rotation."""
        assert self.document_lengths is not None
        lengths = torch.tensor((0, *self.document_lengths), dtype=torch.int32)
        bounds, device = lengths.cumsum(0, dtype=torch.int32), self.rotation.cos.device
        if device.type == "cuda":
            bounds = bounds.pin_memory()  # from other memory the copy could wait for the device
        return bounds.to(device, non_blocking=True)

    def window_mask(self, num_queries: int, num_keys: int, window: int, q: Tensor) -> Tensor:
        """What to add to a block's scores, [queries, keys]: 0 for the last `window` keys up to the query, and -inf elsewhere.

        The last query is at the last key. In the precision and on the device of `q`. Backward passes keep the mask, so that all
        layers use the same one.
        """
        at = (num_queries, num_keys, window, q.dtype, q.device)
        if at not in self._masks:
            keys = torch.arange(num_keys, device=q.device)
            age = keys[num_keys - num_queries :].unsqueeze(1) - keys
            hidden = (age < 0) | (age >= window)
            self._masks[at] = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return self._masks[at]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences,
    *, window: int | None = None, dropout: float = 0.0, kernel: Kernel | None = None,
) -> Tensor:  # fmt: skip
    """dropout(softmax(q kᵀ / √D)) v, where a query sees the last `window` keys of its document up to itself.

    Args:
        q: [B, S, N, D].
        k, v: [B, S, K, D].
        sequences: where the documents are.
        window: keys that a query sees, itself included; None: all up to itself.
        dropout: the part of the weights that is set to zero.
        kernel: one in particular; default: the fastest that can do this.

    Returns:
        [B, S, N, D].

    Raises:
        ValueError: the kernel that is asked for cannot do this here; the message says why.
    """
    lengths = sequences.document_lengths
    longest = q.shape[1] if lengths is None else max(lengths)
    if window is not None and window >= longest:
        window = None
    is_plain = lengths is None and window is None
    match choose_kernel(q.device, q.dtype, is_plain=is_plain, has_dropout=dropout > 0, wanted=kernel):
        case "flash-attn":
            return _flash_attn(q, k, v, sequences, window, dropout)
        case "varlen":
            return _varlen(q, k, v, sequences, window)
        case "sdpa":
            return _sdpa(q, k, v, sequences, window, dropout)


def choose_kernel(
    device: torch.device, dtype: torch.dtype, *, is_plain: bool, has_dropout: bool, wanted: Kernel | None
) -> Kernel:
    """The kernel to use.

    Args:
        is_plain: every sequence is one document, and no window is shorter.
        wanted: one in particular, or None.

    Raises:
        ValueError: the wanted kernel cannot do this here.
    """
    asked = f"attention_kernel={wanted!r}"  # as the setting is called
    fits_gpu_kernels = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if wanted in ("flash-attn", "varlen") and not fits_gpu_kernels:
        raise ValueError(f"{asked} computes on CUDA in bf16 or fp16, not on {device.type} in {dtype}. Use 'sdpa'")
    if wanted == "flash-attn" and flash_attn_package() is None:
        raise ValueError(f"{asked} needs the package flash-attn, which is not installed. Install it, or use 'sdpa'")
    if wanted == "varlen" and has_dropout:
        raise ValueError(f"{asked} has no attention dropout. Use 'flash-attn' or 'sdpa', or set attention dropout to 0")
    if wanted is not None:
        return wanted
    if not fits_gpu_kernels:
        return "sdpa"
    if flash_attn_package() is not None:
        return "flash-attn"
    return "sdpa" if is_plain or has_dropout else "varlen"


def flash_attn_package() -> ModuleType | None:
    """The flash-attn package, imported when first asked for; None where it is not installed."""
    try:
        package = importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return None
    return package if hasattr(package, "flash_attn_func") else None  # flash-attn-4 leaves a folder of this name, without any


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, dropout: float) -> Tensor:
    package = flash_attn_package()
    assert package is not None
    before = (-1, -1) if window is None else (window - 1, 0)  # the query's own key is not among those before it
    if sequences.document_lengths is None:
        return package.flash_attn_func(q, k, v, dropout_p=dropout, causal=True, window_size=before)  # type: ignore[no-any-return]
    bounds, longest = sequences.boundaries, max(sequences.document_lengths)
    packed = package.flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, longest, longest,
        dropout_p=dropout, causal=True, window_size=before,
    )  # fmt: skip
    return packed.view_as(q)  # type: ignore[no-any-return]


def _varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here: it loads GPU kernels

    if sequences.document_lengths is None:
        sequences = replace(sequences, document_lengths=(q.shape[1],) * q.shape[0])
    bounds, longest = sequences.boundaries, max(sequences.document_lengths or ())
    before = (-1 if window is None else window - 1, 0)
    # PyTorch 2.12 wants to be told that heads share keys and values, 2.11 just lets them and has no such word.
    has_word = "enable_gqa" in signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": q.shape[2] != k.shape[2]} if has_word else {}
    packed = varlen_attn(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, longest, longest, window_size=before, **grouped
    )
    assert isinstance(packed, Tensor)
    return packed.view_as(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, dropout: float) -> Tensor:
    """Document by document, and under a window block by block.

    PyTorch's kernel for the CPU has no dropout. With it three numbers are kept for every query and key of a document (or of a
    block), in single precision at least: the weight, the mask of dropout and their product; besides, keys and values for every
    query head.
    """
    lengths = sequences.document_lengths
    if lengths is None:
        whole = (x.transpose(1, 2) for x in (q, k, v))
        return _sdpa_document(*whole, sequences=sequences, window=window, dropout=dropout).transpose(1, 2)
    packed = (x.flatten(0, 1).unsqueeze(0).transpose(1, 2) for x in (q, k, v))  # [1, heads, B·S, D]
    queries, keys, values = (torch.split(x, list(lengths), 2) for x in packed)
    documents = zip(queries, keys, values, strict=True)
    attended = [_sdpa_document(*document, sequences=sequences, window=window, dropout=dropout) for document in documents]
    return torch.cat(attended, 2).transpose(1, 2).reshape(q.shape)


def _sdpa_document(
    q: Tensor, k: Tensor, v: Tensor, *, sequences: Sequences, window: int | None, dropout: float
) -> Tensor:  # fmt: skip
    """Sequences that are one document each: [B, N, S, D], [B, K, S, D], [B, K, S, D] → [B, N, S, D]."""
    length = q.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True)
    blocks = [
        F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop],
            attn_mask=sequences.window_mask(stop - start, stop - first, window, q), dropout_p=dropout, enable_gqa=True,
        )
        for first, start, stop in window_blocks(length, window, WINDOW_BLOCK)
    ]  # fmt: skip
    return torch.cat(blocks, 2)


class SelfAttention(nn.Module):
    """[T, H] → [T, H]. Each tp rank computes its own heads for all tokens.

    Args:
        attention_dropout: the part of the attention weights that is set to zero, in training only. Ranks of a tp group hold
            different heads, so each needs its own random numbers.
        kernel: what computes the attention; default: the fastest there is (`choose_kernel`).
    """

    def __init__(
        self, config: ModelConfig, group: Group, parameter: ParameterFactory, prefix: str,
        *, attention_dropout: float = 0.0, kernel: Kernel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.group = group
        self.attention_dropout = attention_dropout
        self.kernel = kernel
        self.rotate = rotate  # an attribute: `parallel.compile` puts its own there

        def column(name: str) -> ColumnParallelLinear:
            bias = parameter(f"{prefix}.{name}.bias") if config.qkv_bias else None
            return ColumnParallelLinear(parameter(f"{prefix}.{name}.weight"), group, bias)

        self.q_proj, self.k_proj, self.v_proj = column("q_proj"), column("k_proj"), column("v_proj")
        bias = parameter(f"{prefix}.o_proj.bias", sees_all_tokens=False) if config.o_bias else None
        self.o_proj = RowParallelLinear(parameter(f"{prefix}.o_proj.weight"), group, bias)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            y.view(sequences.batch_size, -1, y.shape[-1] // self.head_dim, self.head_dim)  # [B, S, heads, D]
            for y in column_linear(
                x, *(projection.weight for projection in projections),
                group=self.group, biases=[projection.bias for projection in projections],
            )
        )  # fmt: skip
        q, k = self.rotate(q, sequences.rotation), self.rotate(k, sequences.rotation)
        y = attend(
            q, k, v, sequences,
            window=self.window, dropout=self.attention_dropout if self.training else 0.0, kernel=self.kernel,
        )  # fmt: skip
        return self.o_proj(y.reshape(-1, y.shape[-2] * self.head_dim))  # type: ignore[no-any-return]
