"""The reference's own files: 628 documents tokenized by it, and its index of samples over them."""

import gzip
import hashlib
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from indexed_writer import IndexedDatasetWriter
from tiny_tokenizers import fuzz
from tiny_training import MODEL

from megatron_core_impl import train_config
from megatron_core_impl.data import preprocessing
from megatron_core_impl.data.blend import Blend, blend_order, samples_of_each
from megatron_core_impl.data.gpt_dataset import GPTDataset, TextSamples
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.preprocessing import Job, join, remove_parts
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.data.splits import split_documents
from megatron_core_impl.data.text_encoder import BosEos, TextRecipe
from megatron_core_impl.data.text_files import SourceFile
from megatron_core_impl.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_core_impl.training_data import Role, open_data, parts_of

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer and the text, unpacked."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "tokenizer.model").write_bytes((GOLDEN / "tokenizer" / "llama2.model").read_bytes())
    (folder / "data.jsonl").write_bytes(gzip.decompress((GOLDEN / "preprocess" / "code.jsonl.gz").read_bytes()))
    return folder


def tokenize(folder: Path, name: str, bos_eos: BosEos) -> IndexedDataset:
    """As the reference does, in its own form of file."""
    recipe = TextRecipe(folder, "sentencepiece", bos_eos=bos_eos, parse_special=True)
    file = GOLDEN / "preprocess" / "code.jsonl.gz"
    job = Job((SourceFile(file, file.name),), recipe, folder / name)
    with closing(preprocessing.tokenize(job, 2)) as results:
        assert len(list(results)) == 10
    join(job)
    remove_parts(job)
    return IndexedDataset(folder / name)


@pytest.fixture(scope="module")
def with_eod(folder: Path) -> IndexedDataset:
    return tokenize(folder, "code_eod", "eos")


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
    theirs = tokenize(folder, "code", "none")
    check_bytes(folder, "code")
    # Document 593 holds the C template "states_<s>[<t>]", of which the reference makes the control token 1.
    texts = [json.loads(line)["text"] for line in (folder / "data.jsonl").open()]
    assert [i for i, text in enumerate(texts) if "<s>" in text or "</s>" in text] == [593]
    ours = load_tokenizer(folder)
    assert all(ours.encode(texts[i]) == theirs[i].tolist() for i in (0, 592, 627))
    assert 1 in theirs[593]
    assert not {1, 2} & set(ours.encode(texts[593]))


# The tokens that the reference adds under each setting, in its order.
NEW_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
SETTINGS = {
    "no_new_tokens": (), "new_tokens": NEW_TOKENS, "no_new_tokens_list": CHAT_TOKENS,
    "new_tokens_extra3": (*NEW_TOKENS, "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_awkward_texts_are_the_reference_s(folder: Path, setting: str) -> None:
    golden = json.loads((GOLDEN / "preprocess" / "edge_ids.json").read_text())[setting]
    lines = (GOLDEN / "preprocess" / "edge.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    good = [i for i, text in enumerate(texts) if text != "\ud83d"]  # half a character: the reference crashes, we refuse it
    assert len(good) == 36
    parsing, plain = (load_tokenizer(folder, parse_special=parse, added_tokens=SETTINGS[setting]) for parse in (True, False))
    assert parsing.vocab_size == golden["vocab_size"]
    assert {token: golden["special"][token] for token in SETTINGS[setting]} == parsing.added_tokens
    assert parsing.encode_batch([texts[i] for i in good]) == [golden["ids"][i] for i in good]
    special = {1, 2, *parsing.added_tokens.values()}
    for i in good:
        assert parsing.encode_flat([texts[i]])[0].tolist() == golden["ids"][i]
        assert (plain.encode(texts[i]) == golden["ids"][i]) == (not special & set(golden["ids"][i]))
        assert not special & set(plain.encode(texts[i]))
        assert plain.encode_flat([texts[i]])[0].tolist() == plain.encode(texts[i])


def test_remembered_segments_give_the_library_s_ids(folder: Path) -> None:
    """Llama's vocabulary may be cut; whatever the text, the ids are those of the whole."""
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer._memory is not None
    texts = [json.loads(line)["text"] for line in (folder / "data.jsonl").open()]
    texts = [text for text in texts if len(text) < 20_000][:200] + fuzz(2000)
    for batch in (texts[:150], texts[150:], texts[:50]):  # the last from memory
        ids, sizes = tokenizer.encode_flat(batch)
        expected = tokenizer.encode_batch(batch)
        assert sizes.tolist() == [len(one) for one in expected]
        assert ids.tolist() == [token for one in expected for token in one]


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


def test_blend_is_the_reference_s(folder: Path, with_eod: IndexedDataset) -> None:
    """0.3 of the even lines and 0.7 of the odd ones. The reference goes on beyond the samples that it was asked for."""
    golden: dict[str, Any] = dict(np.load(GOLDEN / "index" / "ref_blend_0.3a_0.7b.npz"))
    for first, name in enumerate("ab"):
        with IndexedDatasetWriter(folder / name, with_eod.dtype) as writer:
            for i in range(first, len(with_eod), 2):
                writer.add_sequence(with_eod[i])
                writer.end_document()
    config = train_config.TrainConfig(
        steps=30, sequence_length=1024, micro_batch_size=1, global_batch_size=100, lr=1e-3, split="969,30,1"
    )
    weights, sets = [0.3, 0.7], [train_config.DataSet(prefix=folder / name, fingerprint=name) for name in "ab"]
    roles: tuple[Role, ...] = ("train", "valid")
    for role, num_samples in zip(roles, golden["num_samples"].tolist(), strict=False):
        parts = []
        for number, part in enumerate(parts_of(sets, config.split, role)):
            count = samples_of_each(weights, num_samples)[number]
            data = GPTDataset(part.data, part.documents, sequence_length=1024, num_samples=count, seed=1234)
            np.testing.assert_array_equal(data.index.documents, golden[f"{role}_ds{number}_doc_idx"])
            np.testing.assert_array_equal(data.index.samples, golden[f"{role}_ds{number}_sample_idx"])
            np.testing.assert_array_equal(data.index.shuffle, golden[f"{role}_ds{number}_shuffle_idx"])
            parts.append(TextSamples(data))
        blend = Blend(parts, blend_order(weights, num_samples))
        assert len(blend) == num_samples
        np.testing.assert_array_equal(blend.part, golden[f"{role}_dataset_index"][:num_samples])
        np.testing.assert_array_equal(blend.number, golden[f"{role}_dataset_sample_index"][:num_samples])
        np.testing.assert_array_equal(tokens_of(blend), golden[f"{role}_samples"][:20])
    weighed = tuple(replace(one, weight=weight) for one, weight in zip(sets, weights, strict=True))
    opened = open_data(train_config.Job(config=config, model=MODEL, weights=folder, sets=weighed, folder=folder))
    np.testing.assert_array_equal(tokens_of(opened.train), golden["train_samples"][:20])
    assert opened.test is None, "one of 314 documents is none of either half"


def tokens_of(samples: Samples) -> list[npt.NDArray[np.int64]]:
    """The tokens of the first samples, with the last label."""
    return [np.append(row.tokens, row.labels[-1]) for row in (samples[k] for k in range(20))]
