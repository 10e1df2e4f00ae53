"""The token embedding, its vocabulary cut over the tp group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Group
from megatron_core_impl.layers.parameter import ShardedParameter


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: ShardedParameter, first_id: int, group: Group) -> Tensor:
        ctx.weight, ctx.group = weight, group
        if group is None:
            ctx.save_for_backward(tokens)
            return F.embedding(tokens, weight)
        rows = tokens - first_id
        is_elsewhere = (rows < 0) | (rows >= weight.shape[0])
        rows.masked_fill_(is_elsewhere, 0)
        ctx.save_for_backward(rows, is_elsewhere.unsqueeze_(1))
        embedded = F.embedding(rows, weight).masked_fill_(is_elsewhere, 0)  # [S, H], partial
        return collectives.reduce_scatter(embedded, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        rows, *is_elsewhere = ctx.saved_tensors
        grad = collectives.all_gather(grad, ctx.group).wait()  # [S, H]
        if is_elsewhere:
            grad = grad.masked_fill(is_elsewhere[0], 0)
        if ctx.weight.sink is not None:
            ctx.weight.sink.add_rows(rows, grad)
            return None, None, None, None
        return None, torch.ops.aten.embedding_dense_backward(grad, rows, ctx.weight.shape[0], -1, False), None, None


class VocabParallelEmbedding(nn.Module):
    """Token ids of the whole micro batch → embeddings of this rank's share of the tokens: [S] → [T, H].

    forward   look up the ids of this rank's rows, zero for others  [S, H], partial → reduce-scatter → [T, H]
    backward  all-gather dy → [S, H];  rows of dW are the sums of dy over their tokens, complete
    """

    def __init__(self, weight: ShardedParameter, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.first_id = group.rank() * weight.shape[0] if group else 0

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embedding.apply(tokens, self.weight, self.first_id, self.group)  # type: ignore[no-any-return, no-untyped-call]
