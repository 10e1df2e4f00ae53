"""Several datasets to one, one behind the other, like the reference's tools/merge_datasets.py, without its limit of 2 GiB.

Tokens are copied inside the kernel and the index passes through memory in blocks, so that neither needs room.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_core_impl.data.checking import check_layout, check_lengths
from megatron_core_impl.data.indexed_dataset import BLOCK, IndexedDataset, IndexWriter, copy_into
from megatron_core_impl.data.streams import Streams, bin_path, find_streams, prefix_of


def merge_datasets(paths: Sequence[Path | str], output: Path | str) -> Streams:
    """Write a dataset of the sequences and documents of all of some, in the given order; of conversations all streams.

    It appears under its name once it is whole. What an interrupted merge has left is removed by the next one of that name.

    Args:
        paths: of datasets, as `find_streams` takes them.
        output: the prefix of the new one, which must not be there.

    Raises:
        FileNotFoundError: a dataset is missing, or one of its files.
        ValueError: there is none, one is damaged, they do not go together, one is not laid out in one piece, or the output is
            there already. Nothing is written then.
    """
    if not paths:
        raise ValueError("no dataset to merge: name at least one, by the path of its files without .bin")
    inputs = [find_streams(path) for path in paths]
    merged = Streams(prefix_of(output), inputs[0].suffixes)
    for file in merged.files:
        if file.exists():
            raise ValueError(f"{file}: is there already; name another output, or remove it")
    if not merged.prefix.parent.is_dir():
        raise ValueError(f"{merged.prefix.parent}: there is no such folder for the output; make it first")
    datasets = [_opened(each, inputs[0]) for each in inputs]
    by_stream = list(zip(*datasets, strict=True))
    for of_stream in by_stream:
        _check_alike(of_stream)
    with _unfinished(merged) as unfinished:
        for prefix, of_stream in zip(unfinished.prefixes, by_stream, strict=True):
            _write(prefix, of_stream)
    return merged


def _opened(streams: Streams, first: Streams) -> list[IndexedDataset]:
    """The streams of an input, if they are those of the first one too."""
    if streams.suffixes != first.suffixes:
        told = [" and ".join(each.suffixes) if each.content == "conversations" else "text" for each in (streams, first)]
        raise ValueError(
            f"{streams.prefix} is {told[0]}, {first.prefix} {told[1]}: only datasets of the same streams can be merged"
        )
    opened = [IndexedDataset(prefix) for prefix in streams.prefixes]
    check_lengths(opened)
    return opened


def _check_alike(datasets: Sequence[IndexedDataset]) -> None:
    """Refuse datasets that cannot lie one behind the other."""
    first = datasets[0]
    filled = [dataset for dataset in datasets if len(dataset)]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            raise ValueError(
                f"{dataset.prefix} holds {dataset.dtype.name}, {first.prefix} {first.dtype.name}: datasets of different "
                "types cannot be merged. Tokenize them with the same tokenizer"
            )
        check_layout(dataset)
        ends = int(dataset.doc_idx[-1])
        if len(dataset.doc_idx) > 1 and ends != len(dataset):
            raise ValueError(
                f"{dataset.prefix}: its documents end at sequence {ends:,} of {len(dataset):,}. Make the dataset again"
            )
    for dataset in filled:
        if (len(dataset.doc_idx) > 1) != (len(filled[0].doc_idx) > 1):
            without, others = sorted((dataset, filled[0]), key=lambda each: len(each.doc_idx) > 1)
            raise ValueError(
                f"{without.prefix} does not say where documents end, as the reference's instruction data, {others.prefix} "
                "does: merged, most documents would be lost. Merge each kind by itself"
            )


def _write(output: Path, datasets: Sequence[IndexedDataset]) -> None:
    with bin_path(output).open("wb") as tokens:
        for dataset in datasets:
            copy_into(tokens, bin_path(dataset.prefix))
    len_doc_idx = 1 + sum(len(dataset.doc_idx) - 1 for dataset in datasets)
    with IndexWriter(output, datasets[0].dtype, sum(map(len, datasets)), len_doc_idx) as index:
        before = 0
        for dataset in datasets:
            for start in range(0, len(dataset), BLOCK):
                index.add_sizes(dataset.sizes[start : start + BLOCK])
            for start in range(1, len(dataset.doc_idx), BLOCK):
                index.add_doc_idx(before + dataset.doc_idx[start : start + BLOCK])
            before += len(dataset)


@contextmanager
def _unfinished(streams: Streams) -> Iterator[Streams]:
    """Where to write a dataset that gets its name when it is finished. Nothing is left of one that is not."""
    folder = streams.prefix.with_name(f".{streams.prefix.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        unfinished = streams._replace(prefix=folder / streams.prefix.name)
        yield unfinished
        for path, final in zip(unfinished.files, streams.files, strict=True):
            path.rename(final)
    finally:
        shutil.rmtree(folder)
