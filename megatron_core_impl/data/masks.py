"""What the end of a document means inside a sample: where positions start anew, how far attention sees, what is not predicted.

The token that ends a document (eod) is the document's last; what follows it begins another. A sample begins a document and ends
one, wherever it was cut. These are Megatron-LLM's `--reset_position_ids`, `--reset_attention_mask` and `--eod_mask_loss`
(golden fact G14), without its [S, S] masks: attention takes the lengths of the documents.

    tokens             5 6 2 7 8 2 9 3      with eod 2
    position ids       0 1 2 0 1 2 0 1
    document lengths   3     3     2
    weights            1 1 0 1 1 0 1 1      nothing tells what the next document begins with

B samples of a micro batch, S tokens of each.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


def document_starts(tokens: Tokens, eod_id: int) -> npt.NDArray[np.bool_]:
    """Whether a document begins at a token: [B, S] ids → [B, S]."""
    starts = np.ones(tokens.shape, np.bool_)
    starts[:, 1:] = np.equal(tokens[:, :-1], eod_id)
    return starts


def position_ids(tokens: Tokens, eod_id: int) -> Tokens:
    """The place of every token in its document: [B, S] ids → [B, S], from 0."""
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int64), tokens.shape)
    start_of = np.where(document_starts(tokens, eod_id), places, 0)
    return places - np.maximum.accumulate(start_of, axis=1)


def document_lengths(tokens: Tokens, eod_id: int) -> tuple[int, ...]:
    """Tokens of the documents that lie one after the other in the B·S tokens of a micro batch: [B, S] ids → lengths."""
    starts = np.flatnonzero(document_starts(tokens, eod_id))
    return tuple(np.diff(starts, append=tokens.size).tolist())


def loss_weights(tokens: Tokens, eod_id: int) -> npt.NDArray[np.float64]:
    """0 where the input token ends a document, else 1: [B, S] ids → [B, S]."""
    return np.not_equal(tokens, eod_id).astype(np.float64)
