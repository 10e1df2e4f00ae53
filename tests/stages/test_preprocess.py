"""Preprocess as a stage: its facts and files, what it says of malformed text and unfit tokenizers, and how it stops."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tiny_tokenizers import CODE, train_huggingface, train_sentencepiece
from workers_of_preprocessing import workers

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.preprocessing import Job
from megatron_core_impl.data.tokenizer import load_tokenizer
from stages import preprocess, runtime
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings, PreprocessSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PreprocessSpec, Ref

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
        added_tokens: tuple[str, ...] = (),
        **settings: object,
    ) -> PreprocessSpec:
        contents = [content if isinstance(content, bytes) else content.encode() for content in raw]

        def make_data(spec: DownloadDataSpec, ctx: runtime.Context) -> a.RawDataArtifact:
            sets = []
            for name, content in zip(names, contents, strict=True):
                (ctx.scratch / name).write_bytes(content)
                sets.append(a.RawSet(
                    name=name.split(".")[0], files=(name,), format=form, text_column="text", columns={}, source=name,
                    role="all", documents=None, text_bytes=len(content),
                ))  # fmt: skip
            return ctx.artifact(
                a.RawDataArtifact, figure="", source="texts", revision=None, documents=None, text_bytes=1, sets=tuple(sets)
            )

        def make_model(spec: DownloadModelSpec, ctx: runtime.Context) -> a.ModelArtifact:
            (ctx.scratch / "files").mkdir()
            for name in files:
                (ctx.scratch / "files" / name).write_bytes((tokenizers / name).read_bytes())
            facts = FACTS.model_copy(update={"vocab_size": vocab_size})
            return ctx.artifact(a.ModelArtifact, figure="", model=facts, tokenizer_files=files, source="m", revision=None)

        ws = str(tmp_path / "ws")
        data = runtime.execute(DownloadDataSpec(workspace=ws, data=DataSettings(source="d")), make_data)
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


def test_malformed_lines_fail_the_stage(prepare: Callable[..., PreprocessSpec]) -> None:
    spec = prepare(malformed(TEXTS))
    with pytest.raises(runtime.BadInput) as error:
        execute(spec)
    file = Path(spec.workspace) / spec.inputs["data"].path / "data.jsonl"
    assert str(error.value) == (
        f"3 of the 120 lines are malformed, more than preprocess.max_malformed=0 allows:\n"
        f"  {file}:3: not UTF-8: byte 0xff at column 11\n"
        f'  {file}:50: no key "text"; it has: id\n'
        f"  {file}:51: not JSON: Expecting value at column 1\n"
        "Mend them, or set preprocess.max_malformed to the share of lines that may be left out"
    )
    assert list(spec.folder.parent.glob("[!.]*")) == []
    with pytest.raises(runtime.BadInput, match=r"3 of the 120 lines are malformed, more than preprocess.max_malformed=0.024"):
        execute(prepare(malformed(TEXTS), max_malformed=0.024))


def test_first_malformed_line_ends_the_stage_where_none_is_allowed(
    prepare: Callable[..., PreprocessSpec], small_parts: None
) -> None:
    with pytest.raises(runtime.BadInput, match=r"\d of the first \d+ lines are malformed"):
        execute(prepare(malformed(TEXTS)))
    assert not workers()


def test_malformed_lines_within_the_share_are_left_out(
    prepare: Callable[..., PreprocessSpec], small_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = prepare(malformed(TEXTS), max_malformed=0.025)
    artifact = execute(spec)
    assert artifact.malformed_lines == 3
    assert artifact.figure.endswith(
        f"{artifact.documents + artifact.empty_documents} documents, 20 empty, 3 malformed lines left out"
    )
    assert [json.loads(line) for line in (spec.folder / "malformed.jsonl").read_text().splitlines()] == [
        {"file": "data.jsonl", "line": 3, "reason": "not UTF-8: byte 0xff at column 11"},
        {"file": "data.jsonl", "line": 50, "reason": 'no key "text"; it has: id'},
        {"file": "data.jsonl", "line": 51, "reason": "not JSON: Expecting value at column 1"},
    ]
    assert "warning: 3 malformed lines left out, listed in malformed.jsonl" in capsys.readouterr().out
    data = IndexedDataset(spec.folder / "data")
    tokenizer = load_tokenizer(Path(spec.workspace) / spec.inputs["model"].path / "files")
    kept = [text for number, text in enumerate(TEXTS, 1) if text and number not in (3, 50, 51)]
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), 2] for text in kept]


def test_many_malformed_lines_are_not_all_named(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(runtime.BadInput, match=r"(?s)7 of the 7 lines.*data.jsonl:5: an array.*\n  and 2 more\nMend them"):
        execute(prepare("[]\n" * 7))


@pytest.mark.parametrize("raw", ["", lines_of(["", ""]), lines_of([""]) + " \n\n"])
def test_no_text_is_an_error(prepare: Callable[..., PreprocessSpec], raw: str) -> None:
    count, empty = raw.count("\n"), raw.count('""')
    counts = rf"{empty} empty, 0 malformed, {count - empty} blank"
    message = rf"data\.jsonl: no document with text in {count} lines \({counts}\)\. Check data\.source"
    with pytest.raises(runtime.BadInput, match=message):
        execute(prepare(raw))


def test_tokenizer_must_fit_the_model(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(runtime.BadInput, match=r"the tokenizer has 320 ids, the model's config\.json has vocab_size=319"):
        execute(prepare(lines_of(TEXTS), vocab_size=319))
    with pytest.raises(runtime.BadInput, match=r"preprocess\.tokenizer=huggingface: .*files: has no tokenizer\.json"):
        execute(prepare(lines_of(TEXTS), tokenizer="huggingface"))


def test_ends_need_a_token(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(runtime.BadInput, match=r"preprocess\.bos_eos=eos: the tokenizer names no end-of-text token"):
        execute(prepare(lines_of(TEXTS), files=("tokenizer.json",)))


def test_added_tokens_are_facts_and_their_text_is_text(prepare: Callable[..., PreprocessSpec]) -> None:
    texts = ["a <|user|> b</s>"]
    artifact = execute(prepare(lines_of(texts), added_tokens=("<|user|>", "</s>")))
    assert artifact.tokenizer.added_tokens == {"<|user|>": 320, "</s>": 2}
    assert artifact.tokenizer.vocab_size == 321
    spec = prepare(lines_of(texts), added_tokens=("<|user|>", "</s>"), bos_eos="both", reference_special_text=True)
    assert execute(spec).bos_eos == "both"
    ids = IndexedDataset(spec.folder / "data")[0].tolist()
    assert (ids[0], ids[-2:], ids.count(320)) == (1, [2, 2], 1)
    with pytest.raises(runtime.BadInput, match=r"model\.added_tokens: added tokens \['<a>', '<a>'\] must be texts"):
        execute(prepare(lines_of(texts), added_tokens=("<a>", "<a>")))


def test_each_set_becomes_a_dataset(prepare: Callable[..., PreprocessSpec], tmp_path: Path) -> None:
    content = malformed(TEXTS)
    spec = prepare(content, gzip.compress(content), names=("web.jsonl", "code.jsonl.gz"), max_malformed=0.03, workers=1)
    artifact = execute(spec)
    assert [(s.name, s.documents, s.malformed_lines) for s in artifact.sets] == [("web", 97, 3), ("code", 97, 3)]
    assert (artifact.documents, artifact.malformed_lines) == (194, 6)
    assert sorted(artifact.files) == ["code.bin", "code.idx", "examples.json", "malformed.jsonl", "web.bin", "web.idx"]
    assert artifact.files["web.idx"].sha256 == artifact.files["code.idx"].sha256
    lines = [json.loads(line) for line in (spec.folder / "malformed.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [
        (n, k) for n in ("web.jsonl", "code.jsonl.gz") for k in (3, 50, 51)
    ]


def test_files_that_cannot_be_read(prepare: Callable[..., PreprocessSpec]) -> None:
    whole = gzip.compress(lines_of(TEXTS).encode())
    spec = prepare(whole[:-9], names=("data.jsonl.gz",), max_malformed=1.0)
    with pytest.raises(runtime.BadInput, match=r"/data\.jsonl\.gz: ends early, in the middle of its compressed data"):
        execute(spec)
    assert list(spec.folder.parent.glob(".*.partial")) == []


def test_conversations_need_a_template(prepare: Callable[..., PreprocessSpec]) -> None:
    with pytest.raises(runtime.BadInput, match=r'has no chat template .* Set preprocess\.chat_template to "chatml" or '):
        execute(prepare("", form="alpaca"))
    with pytest.raises(runtime.BadInput, match=r"model\.added_tokens"):
        execute(prepare("", form="alpaca", chat_template="chatml"))


def test_killed_worker_can_be_run_again(
    prepare: Callable[..., PreprocessSpec], small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = prepare(lines_of(TEXTS))
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Context, "progress", lambda *_: [os.kill(child, signal.SIGKILL) for child in workers()])
        with pytest.raises(runtime.Interrupted) as error:
            execute(spec)
    assert re.match(
        r"worker process \d+ was killed by SIGKILL\. If that was the kernel, for lack of memory, lower", str(error.value)
    )
    assert "preprocess.workers (now 2); then run again" in str(error.value)
    finished = len(list(spec.folder.parent.glob(".*.partial/data.parts-*/*.json")))
    assert finished > 0
    old = []
    monkeypatch.setattr(
        preprocess.Counts, "add", lambda self, p, add=preprocess.Counts.add: (old.append(not p.is_new), add(self, p))
    )
    assert execute(spec).documents == 100
    assert sum(old) >= finished


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
    assert process.returncode == runtime.ExitCode.INTERRUPTED
    assert err == f"error: preprocess: stopped by {number.name}; run it again to go on\n"
    assert not spec.folder.exists()
    assert not list(spec.folder.parent.glob(".*.partial/*.idx"))  # parts at most
