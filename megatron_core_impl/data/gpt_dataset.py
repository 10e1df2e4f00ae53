"""Samples of `sequence_length + 1` tokens from shuffled documents, in exactly the order of Megatron-LLM.

Three arrays, all from one stream of `np.random.RandomState(seed)`, decide everything:

- documents: the documents of as many epochs as the samples need, shuffled;
- samples: laid end to end, that stream of tokens is cut every `sequence_length` tokens, so neighbours share one token: a
  sample's last label is the next one's first input. A cut is a pair (position in `documents`, token within it);
- shuffle: the order in which the samples are used.

The last epoch is shuffled apart from the others when less than 80 % of it is used, so that all documents are seen about
equally often. Documents follow each other without a mark, unless the text was tokenized with an EOS after each document.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data import masks
from megatron_core_impl.data.index_cache import cached
from megatron_core_impl.data.indexed_dataset import IndexedDataset, Tokens
from megatron_core_impl.data.samples import Row

SHARE_OF_WHOLE_EPOCH = 0.80  # a last epoch of which less is used is shuffled apart
BLOCK = 1 << 15  # documents that are cut at a time: what they need stays in the processor's cache


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample lies and in which order they are used."""

    documents: npt.NDArray[np.int32]  # [epochs * documents] number of the sequence in the file
    samples: npt.NDArray[np.int32]  # [samples + 1, 2] position in `documents`, token within that document
    shuffle: npt.NDArray[Any]  # [samples] uint32; int64 from 2^32 - 2 samples


def build_sample_index(
    sizes: npt.NDArray[np.integer[Any]], documents: range, *, sequence_length: int, num_samples: int, seed: int
) -> SampleIndex:
    """Build the index of at least `num_samples` samples over the given documents. `sizes`: tokens of each document.

    Raises:
        ValueError: the documents hold less than one sample.
    """
    per_epoch = int(sizes[documents.start : documents.stop].sum(dtype=np.int64))
    if per_epoch <= sequence_length:
        raise ValueError(
            f"documents {documents.start:,} to {documents.stop:,} hold {per_epoch:,} tokens, less than one sample of "
            f"{sequence_length:,} + 1: give more text, a larger share of the split, or a smaller sequence_length"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    epochs = -(-(num_samples * sequence_length + 1) // per_epoch)
    total = samples_of_tokens(epochs * per_epoch, sequence_length)
    whole = samples_of_tokens((epochs - 1) * per_epoch, sequence_length)  # before the last epoch
    of_one = samples_of_tokens(per_epoch, sequence_length)
    is_last_apart = epochs > 1 and num_samples - whole < int(SHARE_OF_WHOLE_EPOCH * of_one)

    # One stream of random numbers: the order of these calls is part of the format.
    random = np.random.RandomState(seed)
    order = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
    last = len(documents) * (epochs - 1) if is_last_apart else 0
    random.shuffle(order[:last])
    random.shuffle(order[last:])
    shuffle = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    first = whole if is_last_apart else total
    random.shuffle(shuffle[:first])
    random.shuffle(shuffle[first:])
    return SampleIndex(order, _cut(sizes, order, sequence_length, total), shuffle)


def samples_of_tokens(tokens: int, sequence_length: int) -> int:
    """How many samples so many tokens in a row give: each but the first begins with the last token of the one before."""
    return max(0, (tokens - 1) // sequence_length)


def _cut(
    sizes: npt.NDArray[np.integer[Any]], order: npt.NDArray[np.int32], sequence_length: int, num_samples: int
) -> npt.NDArray[np.int32]:
    """Where tokens 0, L, 2L, … of documents laid end to end are: (document, token within it), [num_samples + 1, 2]."""
    samples = np.empty((num_samples + 1, 2), np.int32)
    numbers = np.arange(BLOCK, dtype=np.int32)
    # Within a block tokens are counted from its start, which nearly always fits in 32 bits, and takes half the time.
    dtype: type[np.int32 | np.int64] = np.int32 if BLOCK * int(sizes.max()) + 2 * sequence_length < 2**31 else np.int64
    starts: npt.NDArray[np.integer[Any]] = np.zeros(BLOCK + 1, dtype)  # of the block's documents, and of what comes after them
    start = cut = 0  # the token that the block begins with, and the first cut at or after it
    for first in range(0, len(order), BLOCK):
        block = order[first : first + BLOCK]
        n = len(block)
        np.cumsum(sizes.take(block), out=starts[1 : n + 1], dtype=dtype)
        at = cut * sequence_length - start  # of that cut in the block
        cuts_before = (starts[: n + 1] + (sequence_length - 1 - at)) // sequence_length
        np.minimum(cuts_before, min(num_samples + 1 - cut, np.iinfo(dtype).max), out=cuts_before)
        position = np.repeat(numbers[:n], cuts_before[1:] - cuts_before[:-1])
        cuts = samples[cut : cut + len(position)]
        np.add(position, first, out=cuts[:, 0], casting="unsafe")
        tokens = np.arange(at, at + len(position) * sequence_length, sequence_length, dtype=dtype)
        np.subtract(tokens, starts.take(position), out=cuts[:, 1], casting="unsafe")
        start, cut = start + int(starts[n]), cut + len(position)
    samples[0] = 0  # the reference starts at the first document even if that is empty
    return samples


class GPTDataset:
    """`dataset[k]`: the tokens of the k-th sample in training order, int64 [sequence_length + 1].

    Inputs are the first `sequence_length` tokens, labels the last. It has at least `num_samples` samples: as many as the
    epochs that it takes. With a cache, the index is mapped into memory as the tokens are.

    Args:
        cache: folder that keeps the index; None: it is made anew.
        fingerprint: of the dataset's content, for the cache.

    Raises:
        ValueError: the documents hold less than one sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        *,
        sequence_length: int,
        num_samples: int,
        seed: int,
        cache: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        wanted = {"sequence_length": sequence_length, "num_samples": num_samples, "seed": seed}
        key = {"kind": "gpt", "data": fingerprint, "documents": [documents.start, documents.stop], **wanted}
        self.index = SampleIndex(**cached(cache, key, lambda: asdict(build_sample_index(dataset.sizes, documents, **wanted))))

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def __getitem__(self, k: int) -> npt.NDArray[np.int64]:
        (start, stop), documents = self._place(k)
        parts: list[Tokens] = [self.dataset[i] for i in documents]
        parts[-1] = parts[-1][: stop + 1]  # the token at the cut belongs to both samples
        parts[0] = parts[0][start:]
        return np.concatenate(parts, dtype=np.int64)

    def documents(self, k: int) -> list[int]:
        """The documents that sample k is made of, in order."""
        return self._place(k)[1]

    def _place(self, k: int) -> tuple[tuple[int, int], list[int]]:
        """The documents of sample k, its first token in the first of them, and its last in the last."""
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        s = int(self.index.shuffle[k])
        (first, start), (last, stop) = self.index.samples[s : s + 2].tolist()
        return (start, stop), self.index.documents[first : last + 1].tolist()


@dataclass(frozen=True)
class TextSamples:
    """A GPTDataset as `Samples`. The switches say what the end of a document means inside a sample: see `masks`."""

    data: GPTDataset
    eod_id: int = -1  # the token that ends a document; -1: none does
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> Row:
        ids = self.data[k]
        tokens, eod = ids[:-1], self.eod_id
        return Row(
            tokens=tokens,
            labels=ids[1:],
            weights=masks.loss_weights(tokens, eod) if self.eod_mask_loss else None,
            position_ids=masks.position_ids(tokens, eod) if self.reset_position_ids else None,
            document_lengths=masks.document_lengths(tokens, eod) if self.reset_attention_mask else None,
        )

    def length(self, k: int) -> int:
        return self.data.sequence_length

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        """See `Samples`."""
        return self.data.dataset, self.data.documents(k)
