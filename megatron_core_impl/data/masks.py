"""What the end of a document means inside a sample: where positions start anew, how far attention sees, what is not predicted.

The token that ends a document (eod) is the document's last; what follows it begins another. A sample begins a document and ends
one, wherever it was cut. These are Megatron-LLM's `--reset_position_ids`, `--reset_attention_mask` and `--eod_mask_loss`
(golden fact G14), without its [S, S] masks: attention takes the lengths of the documents.

    tokens             5 6 2 7 8 2 9 3      with eod 2
    position ids       0 1 2 0 1 2 0 1
    document lengths   3     3     2
    weights            1 1 0 1 1 0 1 1      nothing tells what the next document begins with

n tokens of a sample.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


def document_starts(tokens: Tokens, eod_id: int) -> npt.NDArray[np.intp]:
    """Where documents begin: [n] ids → positions, 0 the first."""
    return np.concatenate(([0], 1 + np.flatnonzero(tokens[:-1] == eod_id)))


def document_lengths(tokens: Tokens, eod_id: int) -> tuple[int, ...]:
    """Tokens of the documents that lie one after the other in a sample: [n] ids → lengths, sum n."""
    return tuple(np.diff(document_starts(tokens, eod_id), append=len(tokens)).tolist())


def position_ids(tokens: Tokens, eod_id: int) -> Tokens:
    """The place of every token in its document: [n] ids → [n], from 0."""
    starts = document_starts(tokens, eod_id)
    return np.arange(len(tokens)) - np.repeat(starts, np.diff(starts, append=len(tokens)))


def loss_weights(tokens: Tokens, eod_id: int) -> npt.NDArray[np.float64]:
    """0 where the input token ends a document, else 1: [n] ids → [n]."""
    return np.not_equal(tokens, eod_id).astype(np.float64)
