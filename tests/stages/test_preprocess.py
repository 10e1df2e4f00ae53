"""Preprocess as a stage: its facts and files, what it says of malformed text and unfit tokenizers, and how it stops."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizers import CODE, train_huggingface, train_sentencepiece
from workers_of_preprocessing import workers

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data import preprocessing
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.preprocessing import Job
from megatron_core_impl.data.tokenizer import load_tokenizer
from stages import preprocess, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings, PreprocessSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.process import ExitCode
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PreprocessSpec, Ref
from stages.outcomes import BadInput, Interrupted

_CONFIG = ModelConfig(
    family="llama", vocab_size=320, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
)  # fmt: skip
FACTS = a.ModelFacts(**vars(_CONFIG), dtype="float32", parameters=1000)
TEXTS = [*CODE, "", "</s> is text\u2028"] * 20


def lines_of(texts: list[str]) -> str:
    return "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both kinds of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(folder)
    train_huggingface(folder)
    return folder


@pytest.fixture
def prepare(tmp_path: Path, tokenizers: Path) -> Callable[..., PreprocessSpec]:
    """Makes the results of download and gives the spec of preprocess."""

    def prepare(
        *raw: str | bytes,
        vocab_size: int = 320,
        files: tuple[str, ...] = ("tokenizer.model",),
        names: tuple[str, ...] = ("data.jsonl",),
        form: str = "text",
        columns: tuple[str, ...] = ("text",),
        added_tokens: tuple[str, ...] = (),
        replaced: dict[str, bytes] | None = None,
        **settings: object,
    ) -> PreprocessSpec:
        contents = [content if isinstance(content, bytes) else content.encode() for content in raw]

        def make_data(spec: DownloadDataSpec, ctx: Context) -> a.RawDataArtifact:
            sets = []
            for number, (name, content) in enumerate(zip(names, contents, strict=True)):
                (ctx.scratch / name).write_bytes(content)
                sets.append(a.RawSet(
                    name=name.split(".")[0], key=f"data[{number}]" if len(names) > 1 else "data", role="all", files=(name,),
                    origins=(f"my/{name}",), format=form, text_columns=columns, columns={}, source=name, documents=None,
                    text_bytes=len(content),
                ))  # fmt: skip
            return ctx.artifact(
                a.RawDataArtifact, figure="", source="texts", revision=None, documents=None, text_bytes=1, sets=tuple(sets)
            )

        def make_model(spec: DownloadModelSpec, ctx: Context) -> a.ModelArtifact:
            (ctx.scratch / "files").mkdir()
            for name in files:
                content = (replaced or {}).get(name) or (tokenizers / name).read_bytes()
                (ctx.scratch / "files" / name).write_bytes(content)
            facts = FACTS.model_copy(update={"vocab_size": vocab_size})
            return ctx.artifact(a.ModelArtifact, figure="", model=facts, tokenizer_files=files, source="m", revision=None)

        ws = str(tmp_path / "ws")
        data = runtime.execute(
            DownloadDataSpec(workspace=ws, data=DataSettings(source=f"d{zlib.crc32(repr((raw, names, columns)).encode())}")),
            make_data,
        )
        model = runtime.execute(DownloadModelSpec(workspace=ws, model=ModelSettings(source="m")), make_model)
        inputs = {name: Ref(path=i.path, fingerprint=i.fingerprint) for name, i in (("data", data), ("model", model))}
        return PreprocessSpec(
            workspace=ws,
            inputs=inputs,
            settings=PreprocessSettings(**settings),
            added_tokens=added_tokens,  # type: ignore[arg-type]
        )

    return prepare


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines per part, so that a small text has many."""
    monkeypatch.setattr(preprocess, "Job", partial(Job, part_bytes=300))


def execute_with_killed_workers(spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch) -> pytest.ExceptionInfo[Interrupted]:
    """Kill the workers after the first part, with others to be made: few of them are made ahead."""
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "WINDOW", 1)
        patch.setattr(Context, "progress", lambda *_: [os.kill(child, signal.SIGKILL) for child in workers()])
        with pytest.raises(Interrupted) as error:
            execute(spec)
    return error


def execute(spec: PreprocessSpec) -> a.DatasetArtifact:
    artifact = runtime.execute(spec, preprocess.run, resumable=True)
    assert isinstance(artifact, a.DatasetArtifact)
    return artifact


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


def malformed(texts: list[str]) -> bytes:
    """Lines of which numbers 3, 50 and 51 are malformed."""
    lines = lines_of(texts).encode().splitlines(keepends=True)
    lines[2], lines[49], lines[50] = b'{"text": "\xff"}\n', b'{"id": 1}\n', b"no json\n"
    return b"".join(lines)


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
