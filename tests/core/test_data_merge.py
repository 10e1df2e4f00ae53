"""What is in a dataset, and several in one: statistics, texts of documents, merging and what it refuses."""

import re
from pathlib import Path

import conversation_files
import numpy as np
import pytest
from indexed_writer import IndexedDatasetWriter
from tiny_tokenizers import CODE, train_sentencepiece

from megatron_core_impl.data import checking, indexed_dataset, inspection, merge
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.inspection import contents_of, document_text, document_tokens
from megatron_core_impl.data.merge import merge_datasets
from megatron_core_impl.data.tokenizer import load_tokenizer


def write(prefix: Path, *documents: list[int]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_sequence(tokens)
            writer.end_document()


def test_merged_datasets_lie_one_behind_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden fact G1: the same file merged twice."""
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    merged = merge_datasets([tmp_path / "data", tmp_path / "data.idx"], tmp_path / "both.bin")
    assert merged.files == (tmp_path / "both.bin", tmp_path / "both.idx")
    data = IndexedDataset(tmp_path / "both")
    assert (data.sizes.tolist(), data.doc_idx.tolist(), data.pointers.tolist()) == (
        [3, 2, 3, 2],
        [0, 1, 2, 3, 4],
        [0, 6, 10, 16],
    )
    write(tmp_path / "at once", [1, 2, 3], [4, 5], [1, 2, 3], [4, 5])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"both.{suffix}").read_bytes() == (tmp_path / f"at once.{suffix}").read_bytes()
    for module in (checking, merge, indexed_dataset):
        monkeypatch.setattr(module, "BLOCK", 1)
    monkeypatch.setattr(indexed_dataset, "COPIED", 3)
    merge_datasets([tmp_path / "data", tmp_path / "both"], tmp_path / "three")
    assert [document.tolist() for document in IndexedDataset(tmp_path / "three")] == [[1, 2, 3], [4, 5]] * 3


def test_datasets_without_documents_are_merged(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "roles", np.uint16) as writer:  # as the reference writes instructions
        writer.add_sequence([1, 2])
    merge_datasets([tmp_path / "roles"] * 2, tmp_path / "both")
    assert IndexedDataset(tmp_path / "both").doc_idx.tolist() == [0]
    assert IndexedDataset(tmp_path / "both").sizes.tolist() == [2, 2]


def test_merging_refuses(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    with IndexedDatasetWriter(tmp_path / "wide", np.int32) as writer:
        writer.add_sequence([1])
    with pytest.raises(ValueError, match=r"wide holds int32, .*data uint16: datasets of different types cannot be merged"):
        merge_datasets([tmp_path / "data", tmp_path / "wide"], tmp_path / "out")
    with pytest.raises(ValueError, match="no dataset to merge: name at least one, by the path"):
        merge_datasets([], tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such folder for the output; make it first"):
        merge_datasets([tmp_path / "data"], tmp_path / "none" / "out")
    with pytest.raises(ValueError, match=r"data\.bin: is there already; name another output"):
        merge_datasets([tmp_path / "data"], tmp_path / "data")
    with (tmp_path / "data.bin").open("ab") as tokens:
        tokens.write(b"\0\0")
    with pytest.raises(ValueError, match=r"data\.bin: has 12 bytes, its sequences take 10"):
        merge_datasets([tmp_path / "data"], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_files_that_are_missing_are_named_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "data", [1])
    write(tmp_path / "half", [1])
    (tmp_path / "half.bin").unlink()
    conversation_files.write(tmp_path / "talks", [[1, 2]], [[1, 2]])
    (tmp_path / "talks-role.idx").unlink()
    for path, told in (
        ("lost", f"there is no dataset {tmp_path}/lost, neither .bin and .idx nor -text and -role. Name one of: "
                 f"{tmp_path}/data, {tmp_path}/half, {tmp_path}/talks-text"),
        ("none/lost", f"nor -text and -role. Nor is there a folder {tmp_path}/none"),
        ("half", f"{tmp_path}/half lacks half.bin: it needs .bin and .idx"),
        ("talks", f"{tmp_path}/talks lacks talks-role.idx: it needs .bin and .idx of -text and -role"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=re.escape(told) + "$"):
            merge_datasets([tmp_path / "data", tmp_path / path], tmp_path / "out")


def test_documents_are_not_lost_where_some_do_not_say_where_they_end(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], [4, 5])
    write(tmp_path / "empty")
    with IndexedDatasetWriter(tmp_path / "roles", np.uint16) as writer:
        writer.add_sequence([1, 2])
    told = f"{tmp_path}/roles does not say where documents end, as the reference's instruction data, {tmp_path}/data does"
    for order in (["data", "roles"], ["roles", "empty", "data"]):
        with pytest.raises(ValueError, match=re.escape(told)):
            merge_datasets([tmp_path / name for name in order], tmp_path / "out")
    merge_datasets([tmp_path / "empty", tmp_path / "data"], tmp_path / "out")
    assert IndexedDataset(tmp_path / "out").doc_idx.tolist() == [0, 1, 2]
    with IndexedDatasetWriter(tmp_path / "open", np.uint16) as writer:
        writer.add_sequence([1])
        writer.end_document()
        writer.add_sequence([2])
    with pytest.raises(ValueError, match=r"open: its documents end at sequence 1 of 2\. Make the dataset again"):
        merge_datasets([tmp_path / "open", tmp_path / "data"], tmp_path / "more")


def test_all_streams_of_conversations_are_merged(tmp_path: Path) -> None:
    conversation_files.write(tmp_path / "a", [[5, 6], [7]], [[1, 2], [2]], [[1, 0.5], [1]])
    conversation_files.write(tmp_path / "b", [[8, 9, 8]], [[0, 1, 2]], [[1, 1, 2]])
    merged = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert merged.suffixes == ("-text", "-role", "-weight")
    text, role, weight = (IndexedDataset(prefix) for prefix in merged.prefixes)
    assert [one.tolist() for one in text] == [[5, 6], [7], [8, 9, 8]]
    assert [one.tolist() for one in role] == [[1, 2], [2], [0, 1, 2]]
    assert [one.tolist() for one in weight] == [[1, 0.5], [1], [1, 1, 2]]
    assert {stream.doc_idx.tolist() == [0] for stream in (text, role, weight)} == {True}

    conversation_files.write(tmp_path / "plain", [[1]], [[2]])
    write(tmp_path / "data", [1])
    told = f"{tmp_path}/plain is -text and -role, {tmp_path}/a -text and -role and -weight: only datasets of the same streams"
    with pytest.raises(ValueError, match=re.escape(told)):
        merge_datasets([tmp_path / "a", tmp_path / "plain"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"data is text, .*plain -text and -role: only datasets of the same streams"):
        merge_datasets([tmp_path / "plain", tmp_path / "data"], tmp_path / "out")
    conversation_files.write(tmp_path / "odd", [[1]], [[2, 2]])
    with pytest.raises(ValueError, match=r"odd-role and .*odd-text have conversations of other lengths"):
        merge_datasets([tmp_path / "plain", tmp_path / "odd"], tmp_path / "out")
    for name in ("both-text.bin", "both-text.idx"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"both-role\.bin: is there already"):
        merge_datasets([tmp_path / "a"], tmp_path / "both")


def test_an_interrupted_merge_is_in_nobody_s_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", [1, 2, 3])
    before = sorted(tmp_path.iterdir())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "copy_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_datasets([tmp_path / "data"], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / ".out.partial").mkdir()  # of one that was killed
    (tmp_path / ".out.partial" / "out.bin").write_bytes(b"half")
    merge_datasets([tmp_path / "data"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "out.bin", "out.idx"]
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "data.bin").read_bytes()


def test_contents_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        for document in ([[1, 2, 3], [4]], [[5]], [[6, 7], [8, 9], [10]]):
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    for block in (1 << 20, 2, 1):
        monkeypatch.setattr(inspection, "BLOCK", block)
        found = contents_of(tmp_path / "data")
        assert (found.sequences, found.documents, found.tokens, found.bytes, found.dtype) == (6, 3, 10, 20, "uint16")
        assert (found.shortest, found.longest, found.mean) == (1, 5, 10 / 3)
        assert found.lengths == {"1": 1, "4": 2}
    assert [document_tokens(tmp_path / "data", n).tolist() for n in range(3)] == [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10]]
    for number in (-1, 3):
        with pytest.raises(ValueError, match=rf"data: there is no document {number}; it has 3: 0 to 2"):
            document_tokens(tmp_path / "data", number)
    write(tmp_path / "none")
    none = contents_of(tmp_path / "none")
    assert (none.documents, none.shortest, none.longest, none.mean) == (0, 0, 0, 0)
    write(tmp_path / "empty", [], [1], [])
    found = contents_of(tmp_path / "empty")
    assert (found.documents, found.empty, found.shortest, found.lengths) == (3, 2, 0, {"1": 1})
    with IndexedDatasetWriter(tmp_path / "talks", np.uint16) as writer:  # without documents
        for sequence in ([1, 2], [3], [4, 5, 6]):
            writer.add_sequence(sequence)
    found = contents_of(tmp_path / "talks")
    assert (found.documents, found.sequences, found.tokens, found.longest) == (3, 3, 6, 3)
    assert document_tokens(tmp_path / "talks", 2).tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="there is no document 0; it has none"):
        document_tokens(tmp_path / "none", 0)


def test_text_of_a_document(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    write(tmp_path / "data", *(tokenizer.encode(text) for text in CODE), [320], [1, *tokenizer.encode(CODE[0]), 2])
    assert [document_text(tmp_path / "data", n, tokenizer) for n in range(len(CODE))] == CODE
    with pytest.raises(ValueError, match=r"document 4 has ids 320 to 320, the tokenizer has 320: it is not the one"):
        document_text(tmp_path / "data", len(CODE), tokenizer)
    assert document_text(tmp_path / "data", len(CODE) + 1, tokenizer) == f"<s>{CODE[0]}</s>"
