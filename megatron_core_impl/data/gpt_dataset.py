"""Samples of `sequence_length + 1` tokens from shuffled documents, in exactly the order of Megatron-LLM.

Three arrays, all from one stream of `np.random.RandomState(seed)`, decide everything:

- documents: the documents of as many epochs as the samples need, shuffled;
- samples: laid end to end, that stream of tokens is cut every `sequence_length` tokens, so neighbours share one token: a
  sample's last label is the next one's first input. A cut is a pair (position in `documents`, token within it);
- shuffle: the order in which the samples are used.

The last epoch is shuffled apart from the others when less than 80 % of it is used, so that all documents are seen about
equally often. Documents follow each other without a mark, unless the text was tokenized with append_eod.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.indexed_dataset import IndexedDataset, Tokens

SHARE_OF_WHOLE_EPOCH = 0.80  # a last epoch of which less is used is shuffled apart


def split_documents(split: str, n: int) -> tuple[range, range, range]:
    """The train, valid and test documents of a file of n: contiguous, in the file's order.

    `split` is up to three shares such as "969,30,1" (or with "/"); missing ones are 0, and they need not sum to anything.
    Rounding is the reference's: half to even, what is left over moves all borders.

    Raises:
        ValueError: not shares.
    """
    try:
        shares = [float(part) for part in split.split("," if "," in split else "/")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or sum(shares) == 0:
        raise ValueError(f'split {split!r} must be up to three shares of train, valid and test such as "969,30,1"')
    shares += [0.0] * (3 - len(shares))
    borders = [0]
    for share in shares:
        borders.append(borders[-1] + round(share / sum(shares) * n))
    excess = borders[-1] - n
    train, valid, test = (max(0, border - excess) for border in borders[1:])
    return range(train), range(train, valid), range(valid, test)


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
    total = (epochs * per_epoch - 1) // sequence_length  # samples in all epochs
    whole = ((epochs - 1) * per_epoch - 1) // sequence_length if epochs > 1 else 0  # samples before the last epoch
    of_one = (per_epoch - 1) // sequence_length
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
    return SampleIndex(order, _cut(sizes[order], sequence_length, total), shuffle)


def _cut(sizes: npt.NDArray[np.integer[Any]], sequence_length: int, num_samples: int) -> npt.NDArray[np.int32]:
    """Where tokens 0, L, 2L, … of documents laid end to end are: (document, token within it), [num_samples + 1, 2]."""
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts_before = -(-ends // sequence_length)  # cuts at tokens before each document's end
    np.minimum(cuts_before, num_samples + 1, out=cuts_before)
    samples = np.empty((num_samples + 1, 2), np.int32)
    position = np.repeat(np.arange(len(sizes)), np.diff(cuts_before, prepend=0))
    samples[:, 0] = position
    samples[:, 1] = np.arange(num_samples + 1, dtype=np.int64) * sequence_length - (ends - sizes)[position]
    samples[0] = 0  # the reference starts at the first document even if that is empty
    return samples


class GPTDataset:
    """`dataset[k]`: the tokens of the k-th sample in training order, int64 [sequence_length + 1].

    Inputs are the first `sequence_length` tokens, labels the last. It has at least `num_samples` samples: as many as the
    epochs that it takes. Only the index is in memory.

    Raises:
        ValueError: the documents hold less than one sample.
    """

    def __init__(self, dataset: IndexedDataset, documents: range, *, sequence_length: int, num_samples: int, seed: int) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.index = build_sample_index(
            dataset.sizes, documents, sequence_length=sequence_length, num_samples=num_samples, seed=seed
        )

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def __getitem__(self, k: int) -> npt.NDArray[np.int64]:
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        s = int(self.index.shuffle[k])
        (first, start), (last, stop) = self.index.samples[s].tolist(), self.index.samples[s + 1].tolist()
        parts: list[Tokens] = [self.dataset[i] for i in self.index.documents[first : last + 1].tolist()]
        parts[-1] = parts[-1][: stop + 1]  # the token at the cut belongs to both samples
        parts[0] = parts[0][start:]
        return np.concatenate(parts, dtype=np.int64)
