"""What has to happen to gradients across ranks before an optimizer may use them. One home for all but the sum over dp.

Every reduction is a SUM, because the loss is one (`Transformer.loss`): no mean is taken over replicas or micro batches. All of
it acts on the rows that a rank owns once they are summed over dp (`parallel.buckets`): 1/dp of the numbers travel, and rows are
cut alike on all ranks that hold the same tensor. What comes out is the same on all of those, bit for bit, so copies stay equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_core_impl import collectives
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import Mesh


@torch.no_grad()
def complete_gradients(parameters: Sequence[ShardedParameter], grads: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """Complete the gradients of a step, in place, and measure them.

    Args:
        parameters: in the same order on every rank of a tp group.
        grads: for each parameter this rank's rows of the sum over dp, [c, ...].

    Returns:
        The norm of the whole model's gradient as a scalar in fp64, the same on every rank. Nothing waits for it here.
    """
    both = list(zip(parameters, grads, strict=True))
    _sum_over_tokens([grad for p, grad in both if not p.sees_all_tokens], mesh)
    _sum_over_kv_replicas([grad for p, grad in both if p.is_kv_replicated], mesh)
    _sum_over_ends([grad for p, grad in both if p.is_at_both_ends], mesh)
    squares = sum_of_squares([grad for p, grad in both if p.replica == 0], mesh.device)  # each number of the model once
    return collectives.all_reduce_(squares, mesh.world_group).sqrt_()


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ x² over all numbers of all tensors, as a scalar in fp64.

    By rows: PyTorch's fp32 norm of a large tensor on the CPU adds up in one running number and is off by 1e-4 relative.
    """
    rows = [torch.linalg.vector_norm(tensor, dim=-1).flatten() for tensor in tensors]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(rows).double().square_().sum()


def _sum_over_tokens(grads: Sequence[Tensor], mesh: Mesh) -> None:
    """Parameters that act on a tp rank's own tokens (norms, biases of row-parallel layers) have seen no others."""
    collectives.all_reduce_blocks_(grads, mesh.tp_group)


def _sum_over_kv_replicas(grads: Sequence[Tensor], mesh: Mesh) -> None:
    """Key/value projections that several tp ranks hold have seen the query heads of their own rank only."""
    collectives.all_reduce_blocks_(grads, mesh.kv_group)


def _sum_over_ends(grads: Sequence[Tensor], mesh: Mesh) -> None:
    """A tied embedding on the first and on the last pp rank has been used as one thing here, as another there.

    Both add the same two numbers, so their copies remain equal.
    """
    if mesh.pp_group is None:
        return
    other_end = mesh.layout.pp - 1 - mesh.pp_rank
    for grad in grads:
        others = torch.empty_like(grad)
        collectives.send_and_receive([(grad, other_end)], [(others, other_end)], mesh.pp_group).wait()
        grad.add_(others)
