"""What has to happen to gradients across ranks before an optimizer may use them. One home for all of it.

Every reduction is a SUM, because the loss is one (`Transformer.loss`): no mean is taken over replicas or micro batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import Mesh


@torch.no_grad()
def finalize_gradients(
    parameters: Sequence[ShardedParameter], grads: Sequence[Tensor], mesh: Mesh
) -> tuple[list[Tensor], Tensor]:
    """Complete the gradients of a step, and measure them.

    Args:
        parameters: in the same order on every rank.
        grads: for each parameter, what this rank has summed over its micro batches: [dp·c, ...] with c rows per dp rank. It is
            reduced in place; rows of other dp ranks become undefined.

    Returns:
        For each parameter this rank's c rows of the complete gradient (views), and the norm of the whole model's gradient as a
        scalar in fp64, the same on every rank.
    """
    collectives.reduce_scatter_blocks_(grads, mesh.dp_group, mesh.dp_rank)
    own = [grad.chunk(mesh.layout.dp)[mesh.dp_rank] for grad in grads]
    # After the sum over dp, so that 1/dp of the numbers travel: rows are cut alike on all ranks of a tp group.
    _sum_([grad for parameter, grad in zip(parameters, own, strict=True) if not parameter.sees_all_tokens], mesh.tp_group)
    # Each number of the model once: what all tp ranks hold counts on the first.
    counted = [grad for p, grad in zip(parameters, own, strict=True) if mesh.tp_rank == 0 or not p.is_replicated]
    squares = collectives.all_reduce_(sum_of_squares(counted, mesh.device), mesh.world_group)
    return own, squares.sqrt_()


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ x² over all numbers of all tensors, as a scalar in fp64.

    By rows: PyTorch's fp32 norm of a large tensor on the CPU adds up in one running number and is off by 1e-4 relative.
    """
    rows = [torch.linalg.vector_norm(tensor, dim=-1).flatten() for tensor in tensors]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(rows).double().square_().sum()


def _sum_(tensors: Sequence[Tensor], group: Group) -> None:
    """SUM of each tensor over the group, in place and in one launch."""
    if group is None or not tensors:
        return
    summed = collectives.all_reduce_(torch.cat([tensor.flatten() for tensor in tensors]), group)
    for tensor, part in zip(tensors, torch.split(summed, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
