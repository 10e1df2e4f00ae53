"""Cross-entropy over a vocabulary that is cut over the tp group; the logits are never gathered.

Letters: S tokens of the micro batch, V rows of the padded vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, num_real: int, group: Group) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        # Padded rows stay out of the softmax: out of the maximum by fill, then out of the sum as exp(-inf) = 0.
        real = logits[:, :num_real]
        highest = real.amax(dim=1) if num_real else logits.new_full(logits.shape[:1], -torch.inf)
        highest = collectives.all_reduce_(highest.to(wide), group, dist.ReduceOp.MAX)
        exponentials = logits - highest.unsqueeze(1)  # [S, V], in `wide`: the only copy of the logits
        exponentials[:, num_real:] = -torch.inf

        rows = labels - (group.rank() * logits.shape[1] if group else 0)
        is_elsewhere = (rows < 0) | (rows >= num_real)
        rows = rows.masked_fill_(is_elsewhere, 0).unsqueeze(1)
        of_label = exponentials.gather(1, rows).squeeze(1).masked_fill_(is_elsewhere, 0)
        total = exponentials.exp_().sum(dim=1)
        total, of_label = collectives.all_reduce_(torch.stack((total, of_label)), group)

        weights = weights.to(wide)
        ctx.save_for_backward(exponentials, total, weights, rows, is_elsewhere)
        ctx.dtype = logits.dtype
        return torch.dot(total.log().sub_(of_label), weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials, total, weights, rows, is_elsewhere = ctx.saved_tensors
        weights = weights * grad
        grad_logits = exponentials.mul_((weights / total).unsqueeze(1))  # in place: a second backward raises
        grad_logits.scatter_add_(1, rows, weights.neg_().masked_fill_(is_elsewhere, 0).unsqueeze(1))
        return grad_logits.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, num_real: int, group: Group) -> Tensor:
    """The weighted sum of the tokens' losses, the same number on every tp rank.

    Args:
        logits: [S, V], this rank's part of the padded vocabulary.
        labels: [S]; an id outside the vocabulary, such as -100, needs weight 0.
        weights: [S], what each token counts: 0 masks it, 1/N of N tokens makes a mean.
        num_real: rows of the true vocabulary among V; the rest is padding.

    Returns:
        A scalar in fp32, or fp64 where the logits are.

    forward   all-reduce MAX of the highest logit [S];  all-reduce SUM of Σ exp and of the label's logit [2, S]
    backward  none: w (softmax - one-hot) of this rank's rows is complete
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, weights, num_real, group)  # type: ignore[no-any-return, no-untyped-call]
