"""How large the blocks are that layers work in, one after the other, so that large tensors never exist as a whole. No torch.

The layers cut by these numbers, and the estimate of memory (`memory`) counts by them.
"""

BLOCK = 1 << 25  # logits that exist at a time: enough for efficient products, few beside a large micro batch's
CACHED = 1 << 17  # numbers that a CPU works on at a time: in single precision they stay in its cache
WINDOW_BLOCK = 512  # queries that `sdpa` takes at a time under a sliding window


def count_logits_blocks(tokens: int, vocabulary: int) -> int:
    """How many blocks of nearly one size the tokens of a micro batch are cut into for the loss."""
    return min(tokens, -(-tokens * vocabulary // BLOCK))


def window_blocks(length: int, window: int, size: int) -> list[tuple[int, int, int]]:
    """The blocks of `size` queries of a document, and the keys that each sees.

    Returns:
        (first key, first query, end of both) of each block.
    """
    return [(max(0, start - window + 1), start, min(start + size, length)) for start in range(0, length, size)]
