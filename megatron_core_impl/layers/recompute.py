"""Activations that are not kept between forward and backward, but computed again from what they were made of.

This is for *selective* recompute (https://arxiv.org/abs/2205.05198): of results that are large and cheap, and whose inputs are
kept anyway. These are the outputs of norms, which the linear layers after them would keep, and the product act(gate) · up,
which down_proj would. What attention leaves is q, k, v, its output and a number per query: nothing cheap among it. The other
kind, *full* recompute, is `torch.utils.checkpoint` around whole layers (`models.transformer`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Strides(NamedTuple):
    """What stands for a tensor that is not kept: how it lay in the storage of the one that is computed again."""

    size: torch.Size
    stride: tuple[int | torch.SymInt, ...]
    offset: int | torch.SymInt


@contextmanager
def produced(function: Callable[..., Tensor], *inputs: Tensor, is_kept: bool) -> Iterator[Tensor]:
    """`function(*inputs)`; what is done with it inside the block does not keep it, but computes it again when that is needed.

        with produced(norm, x, is_kept=False) as normed:
            y = linear(normed)

    The backward pass of `linear` calls `norm(x)` once more, without a graph; that of `norm` is what it was. Gradients are the
    same to the bit, because `function` gives the same bits again: it must have no randomness and no side effects.

    Functions that use the result must keep it by `save_for_backward`, and must not write to it. Of blocks inside each other the
    innermost counts: what is done there with an outer one's result keeps it.

    Args:
        function: cheap, and on its own without collectives.
        inputs: what it is computed from. They stay in memory until the backward pass has used the result.
        is_kept: keep the result after all, as autograd does by itself.
    """
    output = function(*inputs)
    if is_kept or not torch.is_grad_enabled():
        yield output
        return
    storage = output.untyped_storage()._cdata  # its identity; views of the output share it

    def pack(tensor: Tensor) -> Tensor | _Strides:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return _Strides(tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Tensor | _Strides) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(*inputs).as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield output
