"""Megatron's .bin and .idx: the bytes (golden fact G1), reading back, and what is said of damaged files."""

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from indexed_writer import IndexedDatasetWriter

from megatron_core_impl.data.indexed_dataset import IndexedDataset, IndexWriter, dtype_for


def write(prefix: Path, *documents: list[int]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_sequence(tokens)
            writer.end_document()


def test_bytes_are_the_reference_s(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    assert (tmp_path / "data.bin").read_bytes().hex() == "01000200030004000500"
    assert (tmp_path / "data.idx").read_bytes().hex() == (
        "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600000000000000"
        "000000000000000001000000000000000200000000000000"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5], [65535])
    data = IndexedDataset(tmp_path / "data")
    assert [data[i].tolist() for i in range(len(data))] == [[1, 2, 3], [4, 5], [65535]]
    assert data.sizes.tolist() == [3, 2, 1]
    assert data.pointers.tolist() == [0, 6, 10]
    assert data.doc_idx.tolist() == [0, 1, 2, 3]
    assert data.dtype == np.uint16
    assert not data[0].flags.writeable
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_every_type_of_the_format(tmp_path: Path, dtype: type[np.integer]) -> None:
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        writer.add_documents(np.array([7, 8, 9]), np.array([1, 2]))
    data = IndexedDataset(tmp_path / "data")
    assert data.dtype == dtype
    assert data[1].tolist() == [8, 9]


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "two", np.uint16) as writer:
        writer.add_sequence([1])
        writer.add_sequence([2])
        writer.end_document()
    assert IndexedDataset(tmp_path / "two").doc_idx.tolist() == [0, 2]
    with IndexedDatasetWriter(tmp_path / "none", np.uint16) as writer:  # as the reference writes instructions
        writer.add_sequence([1])
    assert IndexedDataset(tmp_path / "none").doc_idx.tolist() == [0]


def test_empty_dataset(tmp_path: Path) -> None:
    write(tmp_path / "data")
    assert len(IndexedDataset(tmp_path / "data")) == 0


def test_pointers_do_not_overflow_beyond_2_gib(tmp_path: Path) -> None:
    with (tmp_path / "large.bin").open("wb") as tokens:
        tokens.truncate(2 * (2**30 + 5))  # nothing but a hole
    with IndexWriter(tmp_path / "large", np.dtype("<u2"), 2, 3) as index:
        index.add_sizes(np.array([2**30, 5], np.int32))
        index.add_doc_idx(np.array([1, 2]))
    large = IndexedDataset(tmp_path / "large")
    assert large.pointers.tolist() == [0, 2**31]
    assert large[1].tolist() == [0] * 5


@pytest.mark.parametrize(("vocab_size", "name"), [(32000, "uint16"), (65024, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_type_follows_the_vocabulary(vocab_size: int, name: str) -> None:
    assert dtype_for(vocab_size).name == name


def test_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3])
    data = pickle.dumps(IndexedDataset(tmp_path / "data"))
    assert len(data) < 1000
    assert pickle.loads(data)[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"NOTMEGAT", "data.idx: is not the index of a Megatron dataset"),
        (0, b"TNTIDX\0\0", "data.idx: is in the old TNTIDX format"),
        (9, struct.pack("<Q", 2), "data.idx: has version 2 of the format, only 1 is known"),
        (17, b"\x06", "data.idx: has tokens of type code 6; ids are one of 1 uint8"),
        (18, struct.pack("<Q", 3), "data.idx: has 82 bytes, but 3 sequences and 3 entries of doc_idx take 94"),
        (34, struct.pack("<i", -3), "data.idx: sequence 0 is said to be -3 uint16 tokens at byte 0"),
        (38, struct.pack("<i", 3), "data.idx: sequence 1 is said to be 3 uint16 tokens at byte 6 of a .bin of 10 bytes"),
        (50, struct.pack("<q", 5), "data.idx: sequence 1 is said to be 2 uint16 tokens at byte 5"),
        (50, struct.pack("<q", -2), "data.idx: sequence 1 is said to be 2 uint16 tokens at byte -2"),
        (58, struct.pack("<q", 1), "data.idx: doc_idx must rise from 0 to at most 2 sequences"),
        (66, struct.pack("<q", 3), "data.idx: doc_idx must rise from 0 to at most 2 sequences"),
        (74, struct.pack("<q", 3), "data.idx: doc_idx must rise from 0 to at most 2 sequences"),
    ],
)
def test_damage_is_named(tmp_path: Path, at: int, new: bytes, message: str) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    index = bytearray((tmp_path / "data.idx").read_bytes())
    index[at : at + len(new)] = new
    (tmp_path / "data.idx").write_bytes(index)
    with pytest.raises(ValueError, match=re.escape(message)):
        IndexedDataset(tmp_path / "data")


def test_cut_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    tokens, index = (tmp_path / "data.bin").read_bytes(), (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.bin").write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match=r"sequence 1 is said to be 2 uint16 tokens at byte 6 of a \.bin of 8 bytes"):
        IndexedDataset(tmp_path / "data")
    for length in (0, 20, 50, 81):
        (tmp_path / "data.idx").write_bytes(index[:length])
        with pytest.raises(ValueError, match=r"data\.idx: (is not the index|has \d+ bytes)"):
            IndexedDataset(tmp_path / "data")
    (tmp_path / "data.bin").unlink()
    (tmp_path / "data.idx").write_bytes(index)
    with pytest.raises(FileNotFoundError, match=r"data\.bin"):
        IndexedDataset(tmp_path / "data")
