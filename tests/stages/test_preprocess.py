"""Preprocess as a stage: its facts and files, what it says of malformed text and unfit tokenizers, and how it stops."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from preprocess_runs import TEXTS, execute, lines_of, malformed
from sentencepiece import sentencepiece_model_pb2
from workers_of_preprocessing import workers

from megatron_core_impl.data import preprocessing
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.tokenizer import load_tokenizer
from stages import preprocess
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.process import ExitCode
from stages.contracts.specs import PreprocessSpec
from stages.outcomes import BadInput, Interrupted


def execute_with_killed_workers(spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch) -> pytest.ExceptionInfo[Interrupted]:
    """Kill the workers after the first part, with others to be made: few of them are made ahead."""
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "WINDOW", 1)
        patch.setattr(Context, "progress", lambda *_: [os.kill(child, signal.SIGKILL) for child in workers()])
        with pytest.raises(Interrupted) as error:
            execute(spec)
    return error


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_text_becomes_a_dataset(prepare: Callable[..., PreprocessSpec], tokenizers: Path, kind: str) -> None:
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    spec = prepare(lines_of(TEXTS), files=files, tokenizer=kind)
    artifact = execute(spec)
    tokenizer = load_tokenizer(tokenizers, kind)
    data = IndexedDataset(spec.folder / "data")
    texts = [text for text in TEXTS if text]
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    assert data.doc_idx.tolist() == list(range(len(texts) + 1))

    assert sorted(artifact.files) == ["data.bin", "data.idx", "examples.json"]
    assert artifact.tokenizer == a.TokenizerFacts(
        kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, bos_id=tokenizer.bos_id,
        fingerprint=tokenizer.fingerprint, added_tokens={},
    )  # fmt: skip
    assert (artifact.documents, artifact.empty_documents, artifact.malformed_lines) == (100, 20, 0)
    assert artifact.tokens == data.sizes.sum()
    assert (artifact.dtype, artifact.bos_eos, artifact.content) == ("uint16", "eos", "text")
    (only,) = artifact.sets
    assert (only.name, only.role, only.documents, only.tokens, only.empty_documents) == (
        "data",
        "all",
        100,
        artifact.tokens,
        20,
    )
    assert (only.malformed_lines, only.blank_lines, only.left_out) == (0, 0, {})
    assert only.longest == data.sizes.max()
    assert sum(only.lengths.values()) == 100
    pattern = rf"{artifact.tokens:,} tokens · (\d\.\d M|[\d,]+) tokens/s · 120 documents, 20 empty"
    assert re.fullmatch(pattern, artifact.figure), artifact.figure


def test_workers_do_not_change_the_result(prepare: Callable[..., PreprocessSpec], small_parts: None, tmp_path: Path) -> None:
    one = execute(prepare(lines_of(TEXTS), workers=1))
    (tmp_path / "ws").rename(tmp_path / "first")
    three = execute(prepare(lines_of(TEXTS), workers=3))
    assert (one.key, one.fingerprint, one.files) == (three.key, three.fingerprint, three.files)


def test_no_end_of_text(prepare: Callable[..., PreprocessSpec]) -> None:
    spec = prepare(lines_of(TEXTS), bos_eos="none")
    assert execute(spec).bos_eos == "none"
    assert IndexedDataset(spec.folder / "data")[0].tolist() == load_tokenizer(
        spec.folder.parents[1] / spec.inputs["model"].path / "files"
    ).encode(TEXTS[0])


@pytest.mark.parametrize("raw", ["", lines_of(["", ""]), lines_of([""]) + " \n\n"])
def test_no_text_is_an_error(prepare: Callable[..., PreprocessSpec], raw: str) -> None:
    count, empty = raw.count("\n"), raw.count('""')
    counts = rf"{empty} empty, 0 malformed, {count - empty} blank"
    message = rf"data\.source: no document with text in {count} lines of data\.jsonl \({counts}\)\. Check data\.source"
    with pytest.raises(BadInput, match=message):
        execute(prepare(raw))


def test_tokenizer_must_fit_the_model(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(BadInput, match=r"the tokenizer has 320 ids, the model's config\.json has vocab_size=319"):
        execute(prepare(lines_of(TEXTS), vocab_size=319))
    with pytest.raises(BadInput, match=r"preprocess\.tokenizer=huggingface: .*files: has no tokenizer\.json"):
        execute(prepare(lines_of(TEXTS), tokenizer="huggingface"))


def test_ends_need_a_token(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(BadInput) as error:
        execute(prepare(lines_of(TEXTS), files=("tokenizer.json",)))
    assert str(error.value) == (
        "preprocess.bos_eos=eos: the tokenizer names no end-of-text token. Name its eos_token in tokenizer_config.json, or set "
        "preprocess.bos_eos: none"
    )


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ((), "set preprocess.bos_eos: none"),
        (("tokenizer.json", "tokenizer_config.json"), "Set preprocess.tokenizer: huggingface, "),
    ],
)
def test_advice_for_a_sentencepiece_model_without_an_end(
    prepare: Callable[..., PreprocessSpec], tokenizers: Path, others: tuple[str, ...], advice: str
) -> None:
    """Nothing but its own file says what its tokens are."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((tokenizers / "tokenizer.model").read_bytes())
    proto.trainer_spec.eos_id = -1
    proto.pieces[2].piece = "<other>"
    no_eos = proto.SerializeToString()
    spec = prepare(lines_of(TEXTS), files=("tokenizer.model", *others), replaced={"tokenizer.model": no_eos})
    with pytest.raises(BadInput) as error:
        execute(spec)
    assert f"names no end-of-text token. {advice}" in str(error.value)
    settings = spec.settings.model_copy(update={"tokenizer": "huggingface"} if others else {"bos_eos": "none"})
    assert execute(spec.model_copy(update={"settings": settings})).documents == 100


def test_added_tokens_are_facts_and_their_text_is_text(prepare: Callable[..., PreprocessSpec]) -> None:
    texts = ["a <|user|> b</s>"]
    artifact = execute(prepare(lines_of(texts), added_tokens=("<|user|>", "</s>")))
    assert artifact.tokenizer.added_tokens == {"<|user|>": 320, "</s>": 2}
    assert artifact.tokenizer.vocab_size == 321
    spec = prepare(lines_of(texts), added_tokens=("<|user|>", "</s>"), bos_eos="both", reference_special_text=True)
    assert execute(spec).bos_eos == "both"
    ids = IndexedDataset(spec.folder / "data")[0].tolist()
    assert (ids[0], ids[-2:], ids.count(320)) == (1, [2, 2], 1)
    with pytest.raises(BadInput, match=r"model\.added_tokens: added tokens \['<a>', '<a>'\] must be texts"):
        execute(prepare(lines_of(texts), added_tokens=("<a>", "<a>")))


def test_each_set_becomes_a_dataset(prepare: Callable[..., PreprocessSpec], tmp_path: Path) -> None:
    content = malformed(TEXTS)
    spec = prepare(content, gzip.compress(content), names=("web.jsonl", "code.jsonl.gz"), max_malformed=0.03, workers=1)
    artifact = execute(spec)
    assert [(s.name, s.documents, s.malformed_lines) for s in artifact.sets] == [("web", 97, 3), ("code", 97, 3)]
    assert (artifact.documents, artifact.malformed_lines) == (194, 6)
    assert sorted(artifact.files) == ["code.bin", "code.idx", "examples.json", "malformed.jsonl", "web.bin", "web.idx"]
    assert artifact.files["web.idx"].blake3 == artifact.files["code.idx"].blake3
    lines = [json.loads(line) for line in (spec.folder / "malformed.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [
        (n, k) for n in ("my/web.jsonl", "my/code.jsonl.gz") for k in (3, 50, 51)
    ]


def test_files_that_cannot_be_read(prepare: Callable[..., PreprocessSpec]) -> None:
    whole = gzip.compress(lines_of(TEXTS).encode())
    spec = prepare(whole[:-9], names=("data.jsonl.gz",), max_malformed=1.0)
    with pytest.raises(BadInput, match=r"data\.source: my/data\.jsonl\.gz: ends early, in the middle of its compressed data"):
        execute(spec)
    assert list(spec.folder.parent.glob(".*.partial")) == []


def test_conversations_need_a_template(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(BadInput, match=r'has no chat template .* Set preprocess\.chat_template to "chatml" or '):
        execute(prepare("", form="alpaca"))
    with pytest.raises(BadInput, match=r"model\.added_tokens"):
        execute(prepare("", form="alpaca", chat_template="chatml"))


def test_killed_worker_can_be_run_again(
    prepare: Callable[..., PreprocessSpec], small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = prepare(lines_of(TEXTS))
    error = execute_with_killed_workers(spec, monkeypatch)
    assert re.match(
        r"worker process \d+ was killed by SIGKILL\. If that was the kernel, for lack of memory, lower", str(error.value)
    )
    assert "preprocess.workers (now 2); then run again" in str(error.value)
    finished = len(list(spec.folder.parent.glob(".*.partial/data.parts-*/*.json")))
    assert finished > 0
    old = []
    monkeypatch.setattr(
        preprocess.Counts,
        "add",
        lambda self, p, share, add=preprocess.Counts.add: (old.append(not p.is_new), add(self, p, share)),
    )
    assert execute(spec).documents == 100
    assert sum(old) >= finished


def test_time_left_is_told_once_it_is_known(
    prepare: Callable[..., PreprocessSpec], small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, told = prepare(lines_of(TEXTS)), list[str]()
    execute_with_killed_workers(spec, monkeypatch)
    monkeypatch.setattr(Context, "progress", lambda self, done, total, text: told.append(text))
    execute(spec)
    checks = [text for text in told if "checking" in text]
    assert re.fullmatch(r"0 tokens · checking 1 of \d+ finished parts", checks[0])
    old = [text for text in told if " · 0 documents/s" in text and text not in checks]
    assert old, "parts from before come first"
    assert not any("left" in text for text in old + checks)
    assert all(re.search(r" · \d+s left$", text) for text in told[len(checks) + len(old) :])


def start(spec: PreprocessSpec, tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "stages.preprocess", str(tmp_path / "spec.json")], cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "STAGE_EVENTS": "1"},
    )  # fmt: skip


def test_process(prepare: Callable[..., PreprocessSpec], tmp_path: Path) -> None:
    spec = prepare(lines_of(TEXTS))
    process = start(spec, tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    events = [json.loads(line.removeprefix("@@stage ")) for line in out.splitlines() if line.startswith("@@stage ")]
    assert events[-1]["event"] == "progress"
    assert events[-1]["done"] == events[-1]["total"]
    assert re.fullmatch(r"[\d,]+ tokens · \S+( M)? tokens/s · \S+ documents/s · 0s left", events[-1]["text"])
    assert "120 documents, 20 empty" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_with_its_whole_group_it_ends_quietly(
    prepare: Callable[..., PreprocessSpec], tmp_path: Path, number: signal.Signals
) -> None:
    spec = prepare(lines_of(TEXTS * 700))  # more seconds of work than it gets
    process = start(spec, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tokenizing ")
    if number == signal.SIGTERM:
        while not process.stdout.readline().startswith("@@stage "):
            pass  # at work
    os.killpg(process.pid, number)
    _, err = process.communicate()  # returns when no process holds the pipes any more
    assert process.returncode == ExitCode.INTERRUPTED
    assert err == f"error: preprocess: stopped by {number.name}; run it again to go on\n"
    assert not spec.folder.exists()
    assert not list(spec.folder.parent.glob(".*.partial/*.idx"))  # parts at most
