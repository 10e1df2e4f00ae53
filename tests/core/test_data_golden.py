"""The reference's own files: 628 documents tokenized by it, and its index of samples over them."""

import gzip
import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_core_impl.data.gpt_dataset import GPTDataset, split_documents
from megatron_core_impl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_core_impl.data.tokenization import Job, tokenize_file
from megatron_core_impl.data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer and the text, unpacked."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "tokenizer.model").write_bytes((GOLDEN / "tokenizer" / "llama2.model").read_bytes())
    (folder / "data.jsonl").write_bytes(gzip.decompress((GOLDEN / "preprocess" / "code.jsonl.gz").read_bytes()))
    return folder


def tokenize(folder: Path, name: str, *, append_eod: bool) -> IndexedDataset:
    job = Job(
        folder / "data.jsonl", folder, "sentencepiece", append_eod, dtype_for(32000), parse_special=True
    )  # fmt: skip
    with IndexedDatasetWriter(folder / name, job.dtype) as writer, closing(tokenize_file(job, 2)) as chunks:
        for chunk in chunks:
            writer.add_documents(chunk.tokens, chunk.sizes)
    return IndexedDataset(folder / name)


@pytest.fixture(scope="module")
def with_eod(folder: Path) -> IndexedDataset:
    return tokenize(folder, "code_eod", append_eod=True)


def check_bytes(folder: Path, name: str) -> None:
    expected = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())
    (record,) = (record for record in expected if record["output"] == name)
    for suffix in ("bin", "idx"):
        digest = hashlib.sha256((folder / f"{name}.{suffix}").read_bytes()).hexdigest()
        assert digest == record[f"{suffix}_sha256"], suffix


def test_files_with_eod_are_the_reference_s(folder: Path, with_eod: IndexedDataset) -> None:
    assert len(with_eod) == 628
    check_bytes(folder, "code_eod")


def test_files_without_eod_are_the_reference_s_and_ours_differ_in_one_document(folder: Path) -> None:
    theirs = tokenize(folder, "code", append_eod=False)
    check_bytes(folder, "code")
    # Document 593 holds the C template "states_<s>[<t>]", of which the reference makes the control token 1.
    texts = [json.loads(line)["text"] for line in (folder / "data.jsonl").open()]
    assert [i for i, text in enumerate(texts) if "<s>" in text or "</s>" in text] == [593]
    ours = load_tokenizer(folder)
    assert all(ours.encode(texts[i]) == theirs[i].tolist() for i in (0, 592, 627))
    assert 1 in theirs[593]
    assert not {1, 2} & set(ours.encode(texts[593]))


def test_awkward_texts_are_the_reference_s(folder: Path) -> None:
    expected = json.loads((GOLDEN / "preprocess" / "edge_ids.json").read_text())["no_new_tokens"]["ids"]
    lines = (GOLDEN / "preprocess" / "edge.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    good = [i for i, text in enumerate(texts) if text != "\ud83d"]  # half a character: the reference crashes, we refuse it
    parsing, plain = load_tokenizer(folder, parse_special=True), load_tokenizer(folder)
    assert parsing.encode_batch([texts[i] for i in good]) == [expected[i] for i in good]
    for i in good:
        assert (plain.encode(texts[i]) == expected[i]) == ("<s>" not in texts[i] and "</s>" not in texts[i])
        assert not {1, 2} & set(plain.encode(texts[i]))


@pytest.mark.parametrize(("name", "sequence_length"), [("s1024_e2.5", 1024), ("s1024_e0.5", 1024), ("s256_e1", 256)])
def test_samples_are_the_reference_s(with_eod: IndexedDataset, name: str, sequence_length: int) -> None:
    golden: dict[str, Any] = dict(np.load(GOLDEN / "index" / f"ref_code_eod_{name}.npz"))
    splits = split_documents("969,30,1", len(with_eod))
    assert [0, *(part.stop for part in splits)] == golden["splits"].tolist()
    for part, documents, num_samples in zip(("train", "valid", "test"), splits, golden["num_samples"], strict=True):
        samples = GPTDataset(
            with_eod, documents, sequence_length=sequence_length, num_samples=int(num_samples), seed=1234
        )  # fmt: skip
        assert len(samples) == golden[f"{part}_len"]
        for field, ours in (
            ("doc_idx", samples.index.documents), ("sample_idx", samples.index.samples), ("shuffle_idx", samples.index.shuffle),
        ):  # fmt: skip
            assert ours.dtype == golden[f"{part}_{field}"].dtype
            np.testing.assert_array_equal(ours, golden[f"{part}_{field}"], err_msg=f"{part} {field}")
        numbers = [*range(20), len(samples) - 1]
        np.testing.assert_array_equal([samples[k] for k in numbers], golden[f"{part}_samples"])
