"""From samples to micro batches: padding, widths that all ranks agree on, evaluations that read nothing twice, prefetching."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conversation_files import write
from indexed_writer import IndexedDatasetWriter
from tiny_job import CONFIG, changed, make_job
from tiny_training import MODEL

from megatron_core_impl.batches import evaluation_batches, micro_batches, on_device, training_batches, width_of
from megatron_core_impl.config import Layout
from megatron_core_impl.data.blend import Blend
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.samples import EMPTY_ROW, Row, collate
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.prefetch import Prefetched
from megatron_core_impl.train_config import DataSet
from megatron_core_impl.training_data import open_data


def row(n: int, first: int = 1, **more: object) -> Row:
    return Row(np.arange(first, first + n), np.arange(first + 1, first + n + 1), **more)  # type: ignore[arg-type]


def test_full_rows_stay_what_they_are() -> None:
    batch = collate([row(3), row(3, 7)], 3)
    assert batch.tokens.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert batch.labels.tolist() == [[2, 3, 4], [8, 9, 10]]
    assert batch.weights.tolist() == [[1.0] * 3] * 2
    assert batch[3:] == (None, None, None)


def test_padding_weighs_nothing_and_is_a_document_of_its_own() -> None:
    packed = row(3, 7, weights=np.array([0.5, 0.0, 1.0]), position_ids=np.array([0, 1, 0]), document_lengths=(2, 1))
    batch = collate([row(4), packed, EMPTY_ROW, row(2)], 4)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [7, 8, 9, 0], [0, 0, 0, 0], [1, 2, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, 5], [8, 9, 10, 0], [0, 0, 0, 0], [2, 3, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [0.5, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.document_lengths == (4, 2, 1, 1, 4, 2, 2)


def test_too_long_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 5 tokens does not fit rows of 4"):
        collate([row(5)], 4)


class Lengths:
    """Samples of given lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, k: int) -> Row:
        self.read.append(k)
        return row(self.lengths[k])

    def length(self, k: int) -> int:
        return self.lengths[k]

    def documents(self, k: int) -> tuple[IndexedDataset, list[int]]:
        raise AssertionError("asked for only to name an id that the model does not have")


@pytest.mark.parametrize(
    ("longest", "micro", "tp", "width"), [(1, 1, 1, 16), (16, 1, 1, 16), (17, 1, 1, 32), (95, 1, 1, 96), (97, 1, 1, 100),
                                          (17, 1, 6, 48), (17, 3, 6, 32), (17, 1, 4, 32)],
)  # fmt: skip
def test_width(longest: int, micro: int, tp: int, width: int) -> None:
    config = replace(CONFIG, sequence_length=100, micro_batch_size=micro, global_batch_size=micro)
    assert width_of(longest, config, tp) == width


def mesh_of(dp: int, dp_rank: int) -> Mesh:
    return replace(Mesh.single(), layout=Layout(dp=dp), dp_rank=dp_rank, rank=dp_rank)


def test_all_ranks_have_the_width_of_the_longest_row(tmp_path: Path) -> None:
    job = changed(make_job(tmp_path), sequence_length=64)
    samples = Lengths([3] * 7 + [20] + [5] * 8)
    for rank in range(2):
        first, second = training_batches(samples, changed(job, steps=2, warmup_steps=0), mesh_of(2, rank), 0)
        assert [batch.tokens.shape for batch in first] == [(2, 32)] * 2
        assert [batch.tokens.shape for batch in second] == [(2, 16)] * 2
    assert first[1].document_lengths == (3, 29, 20, 12)
    assert first[1].weights.sum() == 23


@pytest.mark.parametrize(("dp", "expected"), [(1, [4, 4, 2]), (2, [2, 2, 1])])
def test_an_evaluation_reads_every_sample_once(tmp_path: Path, dp: int, expected: list[int]) -> None:
    """19 samples in global batches of 8: the last one is as small as the layout allows, and empty rows fill it."""
    job = changed(make_job(tmp_path), eval_batches=5)
    samples, weights = Lengths([16] * 19), 0.0
    for rank in range(dp):
        batches = list(evaluation_batches(samples, job, mesh_of(dp, rank)))
        assert [len(step) for step in batches] == expected
        weights += sum(float(batch.weights.sum()) for step in batches for batch in step)
    assert sorted(samples.read) == list(range(19))
    assert weights == 19 * 16
    samples.read.clear()
    list(evaluation_batches(samples, changed(job, eval_batches=1), mesh_of(1, 0)))
    assert samples.read == list(range(8)), "and no more than it is given"
    samples.read.clear()
    by_default = changed(job, eval_batches=None, steps=11, eval_interval=11)
    assert by_default.config.eval_samples == 4
    list(evaluation_batches(samples, by_default, mesh_of(1, 0)))
    assert samples.read == list(range(4))


@pytest.mark.parametrize(("kind", "packing"), [("text", False), ("conversations", True), ("conversations", False)])
def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path, kind: str, packing: bool) -> None:
    """By set, document and id: the embedding of a CPU would say "index out of range", that of a GPU less."""
    texts = [[5] * 16 + [n] for n in range(4)] + [[5, 5, 61, 5, 5]]
    if kind == "text":
        prefix = tmp_path / "set"
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for text in texts:
                writer.add_sequence(text)
                writer.end_document()
    else:
        prefix = write(tmp_path / "set", texts, [[2] * len(text) for text in texts])
    sets = (DataSet(prefix=prefix, role="train", fingerprint="f"), DataSet(prefix=prefix, role="valid", fingerprint="f"))
    job = replace(make_job(tmp_path), content=kind, sets=sets)  # type: ignore[arg-type]
    data = open_data(changed(job, packing=packing))
    for samples in (data.train, Blend([data.train], np.zeros(len(data.train), np.int32))):
        with pytest.raises(
            ValueError, match=r"set(-text)?: document 4 has token id 61, which the model does not have: its"
        ) as error:
            micro_batches(samples, 0, 8, job, Mesh.single())
        assert str(error.value).endswith("vocab_size is 61. Preprocess the data with the tokenizer of this model")
    other = replace(job, model=replace(MODEL, vocab_size=62))
    assert len(micro_batches(data.train, 0, 8, other, Mesh.single())) == 4


def test_batches_as_tensors(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    samples = Lengths([16] * 8)
    for precision, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)):
        batches = micro_batches(samples, 0, 8, changed(job, precision=precision), Mesh.single())
        (batch, *_) = on_device(batches, torch.device("cpu"))
        assert (batch.tokens.dtype, batch.weights.dtype) == (torch.int64, dtype)
        assert batch.document_lengths is None


# Prefetching


def test_items_come_in_order_and_are_made_ahead() -> None:
    asked: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for n in range(5):
            asked.append(n)
            if n == 2:
                third.set()
            yield n

    with Prefetched(items(), ahead=2) as feed:
        assert next(feed) == 0
        assert third.wait(10), "room for the third is made by taking the first"
        assert asked == [0, 1, 2], "and no more is made than that"
        assert list(feed) == [1, 2, 3, 4]
        assert list(feed) == []
        assert feed.waited > 0


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError(5, "Input/output error", "data.bin")

    with Prefetched(items()) as feed:
        assert next(feed) == 1
        with pytest.raises(OSError, match=r"data\.bin"):
            next(feed)
        assert list(feed) == []


def test_the_thread_ends_when_training_does() -> None:
    full = threading.Event()

    def forever() -> Iterator[int]:
        for n in count():
            if n == 2:
                full.set()
            yield n

    def stopped() -> None:
        with Prefetched(forever()) as feed:
            next(feed)
            assert full.wait(10), "so that it is waiting for room"
            assert threading.active_count() == before + 1
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert threading.active_count() == before
