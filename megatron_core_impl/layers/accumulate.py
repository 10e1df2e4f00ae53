"""Adding to sums that are kept in more precision than what is added: main gradients."""

import torch
from torch import Tensor

from megatron_core_impl.layers.blocks import CACHED


def add_(total: Tensor, increment: Tensor) -> None:
    """`total += increment`, of any floating-point types.

    Where they differ, PyTorch converts the increment into a copy first: on a CPU in parts that stay in its cache.
    """
    if total.dtype == increment.dtype or total.is_cuda:
        total.add_(increment)
        return
    rows = max(1, CACHED // max(1, increment[0].numel()))
    for part, what in zip(torch.split(total, rows), torch.split(increment, rows), strict=True):
        part.add_(what)


def add_product_(total: Tensor, grad_output: Tensor, x: Tensor, *, is_first: bool, room: Tensor | None = None) -> Tensor | None:
    """Add the gradient of a linear layer's weight, dyᵀ x.

    Where the hardware can, the product is added as it is computed, in the precision of the total.

    Args:
        total: [O, I].
        grad_output: [S, O].
        x: [S, I], of the type of `grad_output`.
        is_first: what `total` holds is not even read: it becomes the product.
        room: what the last call returned, to use again.

    Returns:
        A product in the precision of x, where there had to be one: [O, I].
    """
    dy_t, beta = grad_output.t(), 0 if is_first else 1
    if total.dtype == x.dtype:
        torch.addmm(total, dy_t, x, beta=beta, out=total)
        return None
    if total.is_cuda:  # CPUs have no such product
        torch.addmm(total, dy_t, x, total.dtype, beta=beta, out=total)
        return None
    product = torch.mm(dy_t, x, out=room)
    if is_first:
        total.copy_(product)
    else:
        add_(total, product)
    return product
