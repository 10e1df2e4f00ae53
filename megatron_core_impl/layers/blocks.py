"""How large the blocks are that layers work in, one after the other, so that large tensors never exist as a whole. No torch.

The layers cut by these numbers, and the estimate of memory (`memory`) counts by them.
"""

BLOCK = 1 << 25  # logits that exist at a time: enough for efficient products, few beside a large micro batch's
GPU_BLOCKS = 8  # as many of them at once on a GPU, where each block costs a pass over the output layer and its main gradient
CACHED = 1 << 17  # numbers that a CPU works on at a time: in single precision they stay in its cache
WINDOW_BLOCK = 512  # queries that `sdpa` takes at a time under a sliding window


def count_logits_blocks(tokens: int, vocabulary: int, *, on_gpu: bool) -> int:
    """How many blocks of nearly one size the tokens of a micro batch are cut into for the loss."""
    return min(tokens, -(-tokens * vocabulary // (BLOCK * GPU_BLOCKS if on_gpu else BLOCK)))


def window_blocks(length: int, window: int, size: int) -> list[tuple[int, int, int]]:
    """The blocks of `size` queries of a document, and the keys that each sees.

    Returns:
        (first key, first query, end of both) of each block.
    """
    return [(max(0, start - window + 1), start, min(start + size, length)) for start in range(0, length, size)]
