"""Several datasets to one, one behind the other, like the reference's tools/merge_datasets.py, without its limit of 2 GiB.

Tokens are copied inside the kernel and the index passes through memory in blocks, so that neither needs room.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_core_impl.data.indexed_dataset import BLOCK, IndexedDataset, IndexWriter, bin_path, copy_into, idx_path


def merge_datasets(prefixes: Sequence[Path | str], output: Path | str) -> int:
    """Write `<output>.bin/.idx`: the sequences and documents of all datasets, in the given order.

    Returns:
        How many sequences it has.

    Raises:
        FileNotFoundError: a dataset is missing.
        ValueError: there is none, one is damaged, its tokens are of another type, it is not laid out in one piece, or the
            output is there already. Nothing is written then.
    """
    if not prefixes:
        raise ValueError("no dataset to merge: name at least one prefix, the path of a dataset without .bin")
    for path in (bin_path(output), idx_path(output)):
        if path.exists():
            raise ValueError(f"{path}: is there already; name another output, or remove it")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    first = datasets[0]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            raise ValueError(
                f"{dataset.prefix} holds {dataset.dtype.name}, {first.prefix} {first.dtype.name}: datasets of different "
                "types cannot be merged. Tokenize them with the same tokenizer"
            )
        _check_layout(dataset)
    sequences = sum(map(len, datasets))
    with bin_path(output).open("wb") as tokens:
        for dataset in datasets:
            copy_into(tokens, bin_path(dataset.prefix))
    with IndexWriter(output, first.dtype, sequences, 1 + sum(len(dataset.doc_idx) - 1 for dataset in datasets)) as index:
        before = 0
        for dataset in datasets:
            for start in range(0, len(dataset), BLOCK):
                index.add_sizes(dataset.sizes[start : start + BLOCK])
            for start in range(1, len(dataset.doc_idx), BLOCK):
                index.add_doc_idx(before + dataset.doc_idx[start : start + BLOCK])
            before += len(dataset)
    return sequences


def _check_layout(dataset: IndexedDataset) -> None:
    """Refuse a dataset whose sequences do not lie one behind the other: its .bin cannot be copied as a whole."""
    place = 0
    for start in range(0, len(dataset), BLOCK):
        ends = place + np.cumsum(dataset.sizes[start : start + BLOCK], dtype=np.int64) * dataset.dtype.itemsize
        begins = np.concatenate(([place], ends[:-1]))
        if not np.array_equal(begins, dataset.pointers[start : start + BLOCK]):
            raise ValueError(f"{idx_path(dataset.prefix)}: its sequences do not lie one behind the other in the .bin")
        place = int(ends[-1])
    size = bin_path(dataset.prefix).stat().st_size
    if place != size:
        raise ValueError(
            f"{bin_path(dataset.prefix)}: has {size:,} bytes, its sequences take {place:,}. Make the dataset again"
        )
