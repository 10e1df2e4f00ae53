"""Malformed lines of a text: they fail preprocess with what to do, or are left out where that is asked, and are listed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from preprocess_runs import TEXTS, execute, lines_of, malformed
from workers_of_preprocessing import workers

from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.tokenizer import load_tokenizer
from stages.contracts.specs import PreprocessSpec
from stages.outcomes import BadInput

LISTED = [
    {"source": "data", "file": "my/data.jsonl", "line": line, "reason": reason}
    for line, reason in (
        (3, "not UTF-8: byte 0xff at column 11"),
        (50, 'no key "text"; it has: id'),
        (51, "not JSON: Expecting value at column 1"),
    )
]  # of `malformed`


def test_malformed_lines_fail_the_stage(prepare: Callable[..., PreprocessSpec]) -> None:
    spec = prepare(malformed(TEXTS))
    with pytest.raises(BadInput) as error:
        execute(spec)
    kept = spec.folder.parent / f".{spec.key}.malformed.jsonl"
    assert str(error.value) == (
        f"data.source: 3 of the 120 lines of data.jsonl are malformed, more than preprocess.max_malformed=0 allows:\n"
        f"  my/data.jsonl:3: not UTF-8: byte 0xff at column 11\n"
        f'  my/data.jsonl:50: no key "text"; it has: id\n'
        f"  my/data.jsonl:51: not JSON: Expecting value at column 1\n"
        f"All are listed in {kept}. Mend them, or set preprocess.max_malformed to the share of lines that may be left out"
    )
    assert [json.loads(line) for line in kept.read_text().splitlines()] == LISTED
    assert list(spec.folder.parent.glob("[!.]*")) == list(spec.folder.parent.glob(".*.partial")) == []


def test_above_the_share_all_is_read_and_listed(prepare: Callable[..., PreprocessSpec], small_parts: None) -> None:
    spec = prepare(malformed(TEXTS), max_malformed=0.024)
    with pytest.raises(BadInput, match=r"3 of the 120 lines of data.jsonl are malformed, more than .*max_malformed=0.024"):
        execute(spec)
    kept = spec.folder.parent / f".{spec.key}.malformed.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == LISTED


def test_first_malformed_line_ends_the_stage_where_none_is_allowed(
    prepare: Callable[..., PreprocessSpec], small_parts: None
) -> None:
    spec = prepare(malformed(TEXTS))
    with pytest.raises(BadInput, match=r"1 of the first \d lines of data.jsonl are malformed"):
        execute(spec)
    assert not workers()
    kept = spec.folder.parent / f".{spec.key}.malformed.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == LISTED[:1]


def test_share_of_malformed_lines_is_that_of_each_set(prepare: Callable[..., PreprocessSpec]) -> None:
    good, bad = lines_of(TEXTS * 10), '{"text": 1}\n' * 9
    message = r"data\[1\]\.source: 9 of the 9 lines of bad\.jsonl are malformed, .*max_malformed=0.5 .*\n  my/bad\.jsonl:1: "
    with pytest.raises(BadInput, match=f"(?s){message}"):
        execute(prepare(good, bad, names=("good.jsonl", "bad.jsonl"), max_malformed=0.5))
    with pytest.raises(BadInput, match=r"data\[0\]\.source: 9 of the 9 lines of bad\.jsonl are malformed"):
        execute(prepare(bad, good, names=("bad.jsonl", "good.jsonl")))  # not "the first": all its lines were read


def test_a_set_without_a_document_is_an_error(prepare: Callable[..., PreprocessSpec]) -> None:
    names, counts = ("good.jsonl", "bad.jsonl"), r"\(0 empty, 0 malformed, 2 blank\)"
    message = rf"data\[1\]\.source: no document with text in 2 lines of bad\.jsonl {counts}\. Check data\[1\]\.source, "
    with pytest.raises(BadInput, match=message):
        execute(prepare(lines_of(TEXTS), "\n \n", names=names))
    with pytest.raises(BadInput, match=r"(?s)\(0 empty, 1 malformed, 0 blank\)\n  my/bad.jsonl:1: an array, .*All are listed"):
        execute(prepare(lines_of(TEXTS), "[]", names=names, max_malformed=1.0))


def test_blank_lines_are_told(prepare: Callable[..., PreprocessSpec]) -> None:
    assert execute(prepare(lines_of(TEXTS) + "\n\n")).figure.endswith("120 documents, 20 empty, 2 blank lines")


def test_each_key_is_a_document(prepare: Callable[..., PreprocessSpec]) -> None:
    """The reference's --json_keys, whose datasets are here one: their documents in turn."""
    records = [{"title": text, "text": text[::-1]} for text in TEXTS]
    spec = prepare("".join(json.dumps(record) + "\n" for record in records), columns=("title", "text"), bos_eos="none")
    artifact = execute(spec)
    data = IndexedDataset(spec.folder / "data")
    tokenizer = load_tokenizer(spec.folder.parents[1] / spec.inputs["model"].path / "files")
    texts = [text for record in records for text in (record["title"], record["text"]) if text]
    assert [data[i].tolist() for i in range(len(data))] == [tokenizer.encode(text) for text in texts]
    assert (artifact.documents, artifact.empty_documents) == (200, 40)
    with pytest.raises(BadInput, match=r'my/data.jsonl:1: no key "title"; it has: id, text'):
        execute(prepare(lines_of(TEXTS), columns=("text", "title")))


def test_malformed_lines_within_the_share_are_left_out(
    prepare: Callable[..., PreprocessSpec], small_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = prepare(malformed(TEXTS), max_malformed=0.025)
    artifact = execute(spec)
    assert artifact.malformed_lines == 3
    assert artifact.figure.endswith(
        f"{artifact.documents + artifact.empty_documents} documents, 20 empty, 3 malformed lines left out"
    )
    assert [json.loads(line) for line in (spec.folder / "malformed.jsonl").read_text().splitlines()] == LISTED
    assert (
        "warning: 3 malformed lines left out, listed in malformed.jsonl; data: my/data.jsonl:3: not UTF-8: "
        in capsys.readouterr().out
    )
    data = IndexedDataset(spec.folder / "data")
    tokenizer = load_tokenizer(Path(spec.workspace) / spec.inputs["model"].path / "files")
    kept = [text for number, text in enumerate(TEXTS, 1) if text and number not in (3, 50, 51)]
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), 2] for text in kept]


def test_many_malformed_lines_are_not_all_named(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(BadInput, match=r"(?s)7 of the 7 lines.*data.jsonl:5: an array.*\n  and 2 more\nAll are listed"):
        execute(prepare("[]\n" * 7))
