"""Splits, samples and their order: golden facts G2 and G3, a plain loop as the oracle, and the sampler's promises."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from indexed_writer import IndexedDatasetWriter

from megatron_core_impl.data.gpt_dataset import BLOCK, GPTDataset, build_sample_index
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.sampler import step_samples
from megatron_core_impl.data.splits import split_documents

SIZES = [5, 7, 3, 10, 4]  # of G2


def dataset(folder: Path, sizes: list[int]) -> IndexedDataset:
    """Documents of these sizes; token j of the whole has the value j."""
    with IndexedDatasetWriter(folder / "data", np.int32) as writer:
        writer.add_documents(np.arange(sum(sizes)), np.array(sizes))
    return IndexedDataset(folder / "data")


@pytest.mark.parametrize(
    ("num_samples", "seed", "documents", "shuffle"),
    [
        (7, 1234, [4, 0, 1, 2, 3], [5, 2, 6, 3, 1, 0, 4]),
        (
            16, 1234, [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1],
            [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10, 13, 12, 20, 18, 15, 19, 17, 14, 16],
        ),
        (
            20, 1234, [3, 1, 0, 2, 4, 2, 0, 2, 1, 4, 3, 4, 0, 1, 3],
            [10, 4, 13, 17, 1, 14, 8, 7, 3, 6, 18, 19, 12, 11, 0, 2, 15, 9, 20, 5, 16],
        ),
        (13, 42, [3, 1, 0, 0, 2, 2, 4, 4, 3, 1], [0, 12, 9, 1, 8, 5, 13, 3, 4, 7, 11, 10, 6, 2]),
    ],
)  # fmt: skip
def test_order_is_the_reference_s(num_samples: int, seed: int, documents: list[int], shuffle: list[int]) -> None:
    index = build_sample_index(np.array(SIZES), range(5), sequence_length=4, num_samples=num_samples, seed=seed)
    assert index.documents.tolist() == documents
    assert index.shuffle.tolist() == shuffle
    assert [array.dtype.name for array in (index.documents, index.samples, index.shuffle)] == ["int32", "int32", "uint32"]


def test_samples_are_the_reference_s(tmp_path: Path) -> None:
    samples = GPTDataset(dataset(tmp_path, SIZES), range(5), sequence_length=4, num_samples=7, seed=1234)
    assert samples.index.samples.tolist() == [[0, 0], [1, 0], [1, 4], [2, 3], [3, 0], [4, 1], [4, 5], [4, 9]]
    assert [samples[k].tolist() for k in range(len(samples))] == [
        [16, 17, 18, 19, 20], [4, 5, 6, 7, 8], [20, 21, 22, 23, 24], [8, 9, 10, 11, 12], [0, 1, 2, 3, 4],
        [25, 26, 27, 28, 0], [12, 13, 14, 15, 16],
    ]  # fmt: skip
    assert samples[0].dtype == np.int64
    for k in (-1, 7):
        with pytest.raises(IndexError, match=f"sample {k} of 7"):
            samples[k]
    last = build_sample_index(np.array(SIZES), range(5), sequence_length=4, num_samples=16, seed=1234).samples
    assert len(last) == 22
    assert last[-3:].tolist() == [[12, 9], [14, 0], [14, 4]]


def walk(sizes: npt.NDArray[np.integer], sequence_length: int, num_samples: int) -> list[list[int]]:
    """The reference's way to cut: token by token through the documents."""
    cuts, position, offset = [[0, 0]], 0, 0
    for _ in range(num_samples):
        remaining = sequence_length + 1
        while remaining:
            length = int(sizes[position]) - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                position, offset = position + 1, 0
        cuts.append([position, offset])
    return cuts


@pytest.mark.parametrize("case", range(40))
def test_cuts_equal_a_plain_walk(tmp_path: Path, case: int) -> None:
    random = np.random.RandomState(case)
    sizes = random.randint(1, 30, size=random.randint(1, 40))
    if case % 2:
        sizes[random.randint(0, 2, size=len(sizes)) > 0] = 0  # every other case: half the documents are empty
    length = int(random.randint(1, max(2, min(50, sizes.sum()))))
    documents = range(len(sizes))
    if sizes.sum() <= length:
        pytest.skip("less than one sample")
    data = dataset(tmp_path, sizes.tolist())
    samples = GPTDataset(data, documents, sequence_length=length, num_samples=int(random.randint(1, 60)), seed=case)
    index = samples.index
    assert index.samples.tolist() == walk(sizes[index.documents], length, len(samples))
    stream = np.concatenate([data[i] for i in index.documents])
    assert sorted(index.shuffle.tolist()) == list(range(len(samples)))
    for k, s in enumerate(index.shuffle.tolist()):
        assert samples[k].tolist() == stream[s * length : (s + 1) * length + 1].tolist()


@pytest.mark.parametrize("longest", [100, 3_000_000])  # counted in 32 bits, and in 64
def test_cuts_of_many_blocks_of_documents(longest: int) -> None:
    """The oracle: where each cut lies among the ends of the documents."""
    random = np.random.RandomState(1)
    sizes = random.randint(0, 100, size=3 * BLOCK).astype(np.int32)
    sizes[[0, 5, BLOCK + 1]] = longest
    index = build_sample_index(sizes, range(len(sizes)), sequence_length=64, num_samples=1, seed=3)
    ends = np.cumsum(sizes[index.documents], dtype=np.int64)
    tokens = np.arange(len(index.samples)) * 64
    position = np.searchsorted(ends, tokens, side="right")
    np.testing.assert_array_equal(index.samples[1:, 0], position[1:])
    np.testing.assert_array_equal(index.samples[1:, 1], (tokens - (ends - sizes[index.documents])[position])[1:])


def test_only_the_documents_of_the_split(tmp_path: Path) -> None:
    data = dataset(tmp_path, [10] * 10)
    samples = GPTDataset(data, range(3, 6), sequence_length=4, num_samples=50, seed=1)
    seen = {int(token) for k in range(len(samples)) for token in samples[k]}
    assert seen == set(range(30, 60))


def test_last_epoch_of_which_little_is_used_is_shuffled_apart() -> None:
    index = build_sample_index(np.full(100, 10), range(100), sequence_length=10, num_samples=210, seed=1)
    assert sorted(index.documents[:200].tolist()) == sorted(2 * list(range(100)))
    assert sorted(index.documents[200:].tolist()) == list(range(100))
    assert max(index.shuffle[:199]) == 198  # samples of the last epoch come last


@pytest.mark.parametrize(("last", "is_apart"), [(78, True), (79, False)])  # of the 99 samples of an epoch; 80 % are 79
def test_up_to_which_use_the_last_epoch_is_apart(last: int, is_apart: bool) -> None:
    index = build_sample_index(np.full(100, 10), range(100), sequence_length=10, num_samples=99 + last, seed=1)
    assert (sorted(index.documents[:100].tolist()) == list(range(100))) == is_apart


@pytest.mark.parametrize("documents", [range(0), range(2)])
def test_less_than_one_sample_is_refused(documents: range) -> None:
    message = (
        f"documents 0 to {len(documents)} hold {10 * len(documents)} tokens, less than one sample of 20 \\+ 1: give more text"
    )
    with pytest.raises(ValueError, match=message):
        build_sample_index(np.full(5, 10), documents, sequence_length=20, num_samples=3, seed=1)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        build_sample_index(np.full(5, 10), range(5), sequence_length=20, num_samples=0, seed=1)


@pytest.mark.parametrize(
    ("split", "n", "borders"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]), ("969, 30, 1", 100, [0, 97, 100, 100]), ("969, 30, 1", 37, [0, 36, 37, 37]),
        ("969, 30, 1", 10, [0, 10, 10, 10]), ("90,5,5", 7, [0, 7, 7, 7]), ("100", 5, [0, 5, 5, 5]),
        ("8/1/1", 25, [0, 21, 23, 25]), ("98,2,0", 133, [0, 130, 133, 133]), ("1,0,0", 0, [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_splits_are_the_reference_s(split: str, n: int, borders: list[int]) -> None:
    assert split_documents(split, n) == tuple(range(a, b) for a, b in pairwise(borders))


@pytest.mark.parametrize("split", ["", "a,b,c", "0,0,0", "-1,2,3", "1,2,3,4", "nan,1,1", "inf,1,1"])
def test_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r'must be up to three shares of train, valid and test such as "969,30,1"'):
        split_documents(split, 10)


def test_sampler_s_order() -> None:
    assert step_samples(0, 8, 2, 1, 0) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert step_samples(0, 8, 2, 2, 0) == [[0, 1], [4, 5]]
    assert step_samples(0, 8, 2, 2, 1) == [[2, 3], [6, 7]]
    assert step_samples(16, 8, 4, 2, 1) == [[20, 21, 22, 23]]


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (1, 4), (2, 2), (3, 4), (12, 1), (4, 3)])
def test_set_of_samples_of_a_step_does_not_depend_on_the_layout(micro: int, dp: int) -> None:
    ranks = [step_samples(24, 12, micro, dp, rank) for rank in range(dp)]
    assert sorted(s for batches in ranks for batch in batches for s in batch) == list(range(24, 36))
    for k in range(12 // (micro * dp)):  # and micro batch k of all ranks together is one run of samples
        assert [s for batches in ranks for s in batches[k]] == list(range(24 + k * micro * dp, 24 + (k + 1) * micro * dp))


def test_sampler_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="global_batch_size=8 is not a multiple of micro_batch_size × dp = 3 × 2"):
        step_samples(0, 8, 3, 2, 0)
    with pytest.raises(ValueError, match="dp_rank=2 must be from 0 to 1"):
        step_samples(0, 8, 2, 2, 2)
