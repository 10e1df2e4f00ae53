"""The token embedding, its vocabulary cut over the tp group."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.collectives import Group, reduce_scatter_tokens
from megatron_core_impl.layers.parameter import ShardedParameter


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
        if self.group is None:
            return F.embedding(tokens, self.weight)
        rows = tokens - self.first_id
        is_elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        embedded = F.embedding(rows.masked_fill_(is_elsewhere, 0), self.weight)  # [S, H]
        embedded = embedded.masked_fill(is_elsewhere.unsqueeze(-1), 0)
        return reduce_scatter_tokens(embedded, self.group)
