"""The output layer and the loss in one, block of tokens by block: the logits of a micro batch never exist as a whole.

The loss is a weighted sum of the tokens' losses, and the weights are known beforehand. So the gradient of a block's logits is
made where the logits are, at once, and becomes its part of dx and of dW; the backward pass only scales both.

With logits z = x Wᵀ and p = softmax(z):    dx = c w (p - onehot) W,    dW = Σ c w (p - onehot)ᵀ x

c is the gradient of the loss (a loss scale, 1/N) and w a token's weight. Both come in last, in single precision, so that in
fp16 nothing vanishes for want of the loss scale; only the *ratios* of the weights meet x before.

Over the logits goes one pass only, which leaves e = exp(z - highest), and 0 for the label. p = s e with one number s per token,
which meets the rows of the products instead of the logits. The label's p - 1 stays out of the products: it is added to their
results in single precision, as W's row of the label and as x to dW's row, and keeps its digits where p is nearly 1. Likewise
log Σ e stays apart from the highest logit, beside which it would be rounded.

Letters: T tokens of this rank, S of the micro batch, R of a block, H hidden, V rows of the padded vocabulary on this rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.accumulate import add_product_
from megatron_core_impl.layers.blocks import CACHED, count_logits_blocks
from megatron_core_impl.layers.parameter import ShardedParameter


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: ShardedParameter, labels: Tensor, weights: Tensor, num_real: int, group: Group,
        grads: bool, hits: Tensor | None,
    ) -> Tensor:  # fmt: skip
        gathered = collectives.all_gather(x, group).wait()  # [S, H]
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = weights.to(wide)
        largest = weights.abs().amax().clamp_min_(torch.finfo(wide).tiny)  # all may be 0
        ratios = weights / largest
        rows = labels - (group.rank() * weight.shape[0] if group else 0)
        is_elsewhere = (rows < 0) | (rows >= num_real)
        rows = rows.masked_fill_(is_elsewhere, 0)

        losses = torch.empty_like(weights)
        grad_x = torch.empty_like(gathered) if grads else None
        grad_weight = torch.empty_like(weight, dtype=wide, requires_grad=False) if grads else None
        room = product = None  # for the logits of a block, and for what they add to dW: memory is new only once
        for block in _blocks(gathered, weight.shape[0]):
            tokens = gathered[block]
            room = tokens.new_empty(len(tokens), weight.shape[0]) if room is None else room
            logits = torch.mm(tokens, weight.t(), out=room[: len(tokens)])  # [R, V]
            at = (torch.arange(len(tokens), device=logits.device), rows[block])
            of_label = of_label_anywhere = logits[at].to(wide).masked_fill_(is_elsewhere[block], 0)
            highest, log_sum = _exp_(logits, num_real)
            top, log_total = highest, log_sum  # of all ranks
            if group is not None:
                own = torch.stack((highest, log_sum, of_label)).unsqueeze(0)
                shared = collectives.all_gather(own, group).wait()  # [tp, 3, R]
                top, of_label_anywhere = shared[:, 0].amax(0), shared[:, 2].sum(0)
                log_total = (shared[:, 0] - top + shared[:, 1]).logsumexp(0)
            torch.add(top - of_label_anywhere, log_total, out=losses[block])
            if hits is not None:
                torch.eq(top, of_label_anywhere, out=hits[block])
            if grad_x is None or grad_weight is None:
                continue
            logits[at] *= is_elsewhere[block]
            log_share = highest - top - log_total  # log p/e; what lies in fp16 logits is e / Σ e
            share = (log_share + log_sum if logits.dtype == torch.float16 else log_share).exp_().unsqueeze(1)  # [R, 1]
            of_label = torch.expm1(of_label - top - log_total).masked_fill_(is_elsewhere[block], 0)  # p - 1
            of_label = of_label.unsqueeze(1)
            others = torch.mm(logits, weight).to(wide)
            grad_x[block] = others.mul_(share).addcmul_(weight[rows[block]].to(wide), of_label)
            del others
            ratio = ratios[block].unsqueeze(1)
            product = add_product_(
                grad_weight, logits, (tokens * (share * ratio)).to(x.dtype), is_first=block.start == 0, room=product
            )
            grad_weight.index_add_(0, rows[block], tokens * (of_label * ratio))
        if grad_x is not None:
            ctx.grad_x, ctx.grad_weight = collectives.reduce_scatter(grad_x, group), grad_weight
            ctx.weight, ctx.largest = weight, largest
            ctx.weights = weights if group is None else weights.chunk(group.size())[group.rank()]
        return torch.dot(losses, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_weight is None:
            raise RuntimeError("the loss went backward a second time, but its gradients were used up by the first")
        grad_x, grad_weight = ctx.grad_x.wait(), ctx.grad_weight
        ctx.grad_x = ctx.grad_weight = None  # the loss may live on
        grad_x = (grad_x * (ctx.weights * grad).unsqueeze(1)).to(grad_x.dtype)
        grad_weight.mul_(grad * ctx.largest)
        if ctx.weight.sink is not None:
            ctx.weight.sink.add(grad_weight)
            return grad_x, *[None] * 7
        return grad_x, grad_weight.to(ctx.weight.dtype), *[None] * 6


def vocab_parallel_linear_cross_entropy(
    x: Tensor, weight: ShardedParameter, labels: Tensor, weights: Tensor, num_real: int, group: Group
) -> Tensor:
    """The weighted sum of the tokens' losses, the same number on every tp rank. Goes backward once.

    Args:
        x: [T, H], this rank's tokens.
        weight: [V, H], this rank's part of the padded vocabulary.
        labels: [S]; an id outside the vocabulary, such as -100, needs weight 0.
        weights: [S], what each token counts: 0 masks it, 1/N of N tokens makes a mean.
        num_real: rows of the true vocabulary among V; the rest is padding.
        group: tp.

    Returns:
        A scalar in fp32, or fp64 where `x` is.

    forward   all-gather x → [S, H];  per block of tokens, all-gather of highest logit, log Σ e, the label's  [tp, 3, R]
              dx [S, H], partial → reduce-scatter → [T, H], under which the forward pass ends and the backward pass starts
    backward  none
    """
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, labels, weights, num_real, group, is_trained, None)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def loss_and_hits(
    x: Tensor, weight: ShardedParameter, labels: Tensor, weights: Tensor, num_real: int, group: Group
) -> tuple[Tensor, Tensor]:
    """The same loss without gradients, and for each token whether no other id has a higher logit than its label: [S] bool.

    Both are the same on every tp rank. Where a label lies outside the vocabulary, its hit means nothing.
    """
    hits = torch.empty(labels.shape, dtype=torch.bool, device=labels.device)
    loss = _LinearCrossEntropy.apply(x, weight, labels, weights, num_real, group, False, hits)  # type: ignore[no-untyped-call]
    return loss, hits


def _blocks(x: Tensor, vocabulary: int) -> Iterator[slice]:
    """Cut tokens [S, H] into blocks."""
    size = -(-len(x) // count_logits_blocks(len(x), vocabulary, on_gpu=x.is_cuda))
    return (slice(start, start + size) for start in range(0, len(x), size))


def _exp_(logits: Tensor, num_real: int) -> tuple[Tensor, Tensor]:
    """Replace logits z [R, V] by e = exp(z - highest), and by 0 in columns that are not real.

    In fp16 by e / Σ e: its numbers end at 65504, which a sum over V may exceed. Computed in single precision.

    Returns:
        The highest of each row [R], -inf where no column is real; and log Σ e [R].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    highest = torch.full(logits.shape[:1], -torch.inf, dtype=wide, device=logits.device)
    sums = torch.ones_like(highest)
    logits[:, num_real:] = 0
    if num_real > 0:
        for part, buffer in _cached(logits):
            real, result = buffer[:, :num_real], logits[part, :num_real]
            torch.amax(real, 1, out=highest[part])
            real.sub_(highest[part].unsqueeze(1)).exp_()
            torch.sum(real, 1, out=sums[part])
            if logits.dtype == torch.float16:
                real.div_(sums[part].unsqueeze(1))
            if buffer.dtype != logits.dtype:
                result.copy_(real)
    return highest, sums.log_()


def _cached(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, in single precision at least: views, or where the logits are of less, copies in one buffer."""
    rows = len(logits) if logits.is_cuda else max(1, CACHED // logits.shape[1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    buffer = None if logits.dtype == wide else logits.new_empty(rows, logits.shape[1], dtype=wide)
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        yield slice(start, start + rows), part if buffer is None else buffer[: len(part)].copy_(part)
