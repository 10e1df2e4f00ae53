"""Data that come tokenized, through the real stages: download takes them, preprocess checks them, training opens them."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexed_writer import IndexedDatasetWriter
from tiny_tokenizers import CODE, train_sentencepiece
from tiny_training import MODEL

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.train_config import DataSet, Job, TrainConfig
from megatron_core_impl.training_data import TrainingData, open_data
from stages import download, preprocess, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings, PipelineConfig, PreprocessSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PreprocessSpec, Ref
from stages.outcomes import BadInput

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
GOLDEN_TOKENIZER = GOLDEN / "tokenizer" / "llama2.model"
END = 2  # of a text
CONFIG = TrainConfig(steps=6, sequence_length=16, micro_batch_size=2, global_batch_size=8, lr=1e-2, split="80,20,0")

Read = Callable[..., a.DatasetArtifact]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(folder)
    return folder / "tokenizer.model"


@pytest.fixture
def read(tmp_path: Path, tokenizer: Path) -> Read:
    """Runs download-data and preprocess, beside a model that is there."""

    def read(data: dict[str, Any], *, model: Path = tokenizer, added: tuple[str, ...] = (), **settings: Any) -> Any:

        def make_model(spec: DownloadModelSpec, ctx: Context) -> a.ModelArtifact:
            (ctx.scratch / "files").mkdir()
            (ctx.scratch / "files" / "tokenizer.model").write_bytes(model.read_bytes())
            size = load_tokenizer(ctx.scratch / "files").vocab_size
            config = ModelConfig(**{**vars(MODEL), "vocab_size": size})
            facts = a.ModelFacts(**vars(config), dtype="float32", parameters=1)
            return ctx.artifact(a.ModelArtifact, figure="", model=facts, tokenizer_files=(), source="m", revision=None)

        ws = str(tmp_path / "ws")
        config = PipelineConfig.model_validate(
            {"workspace": ws, "model": {"source": "m"}, "data": data, "train": {"steps": 1}}
        )  # fmt: skip
        raw = runtime.execute(DownloadDataSpec.of(config), download.run)
        base = runtime.execute(DownloadModelSpec(workspace=ws, model=ModelSettings(source="m")), make_model)
        inputs = {name: Ref(path=i.path, fingerprint=i.fingerprint) for name, i in (("data", raw), ("model", base))}
        spec = PreprocessSpec(workspace=ws, inputs=inputs, settings=PreprocessSettings(**settings), added_tokens=added)
        return runtime.execute(spec, preprocess.run, resumable=True)

    return read


def write(prefix: Path, *documents: list[int], dtype: Any = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_sequence(tokens)
            writer.end_document()
    return prefix


def write_conversations(prefix: Path, texts: Any, roles: Any, weights: Any = None) -> None:
    for suffix, sequences, dtype in (("text", texts, "<u2"), ("role", roles, "<u2"), ("weight", weights or (), "<f8")):
        if sequences:
            with IndexedDatasetWriter(f"{prefix}-{suffix}", dtype) as writer:  # no documents, as the reference
                for tokens in sequences:
                    writer.add_sequence(tokens)


def tokenized(prefix: Path) -> dict[str, Any]:
    return {"source": str(prefix), "format": "tokenized"}


def opened(artifact: a.DatasetArtifact, workspace: Path, config: TrainConfig = CONFIG) -> TrainingData:
    folder = artifact.folder(workspace)
    sets = tuple(DataSet(prefix=folder / each.name, role=each.role, fingerprint=each.name) for each in artifact.sets)
    return open_data(
        Job(config=config, model=MODEL, weights=folder, sets=sets, folder=folder, content=artifact.content, eod_id=END)
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_same(artifact: a.DatasetArtifact, workspace: Path, source: Path, name: str = "data") -> None:
    """The files of a set are byte for byte those of the source."""
    mine = sorted(file for file in artifact.files if file.startswith(name))
    theirs = sorted(path.name for path in source.parent.glob(f"{source.name}*"))
    assert [file.removeprefix(name) for file in mine] == [file.removeprefix(source.name) for file in theirs]
    for here, there in zip(mine, theirs, strict=True):
        assert digest(artifact.folder(workspace) / here) == digest(source.parent / there)


def _digests(artifact: a.DatasetArtifact) -> dict[str, str]:
    """Of the data; the examples are of texts, which are gone."""
    return {name: record.blake3 for name, record in artifact.files.items() if name != "examples.json"}


def test_what_is_tokenized_here_can_be_read_again(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": text}) for text in CODE * 10]
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    first = read({"source": str(tmp_path / "code.jsonl")})
    folder = first.folder(tmp_path / "ws")
    for source in (folder / "data", folder / "data.bin", folder / "data.idx"):
        again = read(tokenized(source))
        assert again.sets == first.sets
        assert (again.documents, again.tokens, again.dtype, again.tokenizer, again.content) == (
            first.documents, first.tokens, first.dtype, first.tokenizer, first.content,
        )  # fmt: skip
        assert _digests(again) == _digests(first)
    assert again.figure == f"{first.tokens:,} tokens · 40 documents, 0 empty"
    raw = a.load_artifact(tmp_path / "ws" / again.spec["inputs"]["data"]["path"])
    assert re.fullmatch(r"2 files, [\d.]+ kB of tokens", raw.figure)
    assert str(tmp_path) not in raw.model_dump_json(), "no path of this machine in an artifact"
    assert "warning" not in capsys.readouterr().out
    one, other = opened(first, tmp_path / "ws"), opened(again, tmp_path / "ws")
    assert all(np.array_equal(one.train[k].tokens, other.train[k].tokens) for k in range(48))


def test_documents_of_several_sequences_and_none(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "odd", np.uint16) as writer:
        for document in ([[5] * 30, [6] * 40 + [END]], [], [[7] * 100], [[8] * 200 + [END]], [[9] * 90]):
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    artifact = read(tokenized(tmp_path / "odd"))
    (made,) = artifact.sets
    assert (made.documents, made.empty_documents, made.tokens, made.longest) == (4, 1, 462, 201)
    assert made.lengths == {"64": 3, "128": 1}
    check_same(artifact, tmp_path / "ws", tmp_path / "odd")
    assert len(opened(artifact, tmp_path / "ws").train) >= 48
    assert (
        "warning: 2 of 4 documents of odd do not end with the end-of-text token 2, though preprocess.bos_eos is eos"
    ) in capsys.readouterr().out
    read(tokenized(tmp_path / "odd"), bos_eos="none")
    assert "warning" not in capsys.readouterr().out


def test_beside_text_in_a_blend_and_held_out(read: Read, tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CODE * 3))
    write(tmp_path / "more", *([7] * 50 + [END] for _ in range(20)))
    write(tmp_path / "held", *([8] * 50 + [END] for _ in range(5)))
    artifact = read(
        {
            "blend": [{"source": str(tmp_path / "code.jsonl")}, tokenized(tmp_path / "more")],
            "valid": [tokenized(tmp_path / "held")],
        }
    )
    assert [(each.name, each.role, each.documents) for each in artifact.sets] == [
        ("data-0", "train", 12), ("data-1", "train", 20), ("valid-0", "valid", 5),
    ]  # fmt: skip
    assert artifact.documents == 37
    check_same(artifact, tmp_path / "ws", tmp_path / "more", "data-1")
    data = opened(artifact, tmp_path / "ws")
    assert {int(token) for token in data.valid[0].tokens} <= {8, END}
    assert 7 in {int(token) for k in range(48) for token in data.train[k].tokens}


def test_changed_files_are_taken_anew(read: Read, tmp_path: Path) -> None:
    write(tmp_path / "data", [7] * 50, [8] * 50)
    first = read(tokenized(tmp_path / "data"))
    assert read(tokenized(tmp_path / "data")).key == first.key
    write(tmp_path / "data", [7] * 50, [9] * 50)  # of the same sizes
    os.utime(tmp_path / "data.idx", ns=(1, 1))
    second = read(tokenized(tmp_path / "data"))
    assert second.key != first.key
    assert IndexedDataset(second.folder(tmp_path / "ws") / "data")[1][0] == 9
    assert IndexedDataset(first.folder(tmp_path / "ws") / "data")[1][0] == 8, "what was taken does not change"


def test_conversations(read: Read, tmp_path: Path) -> None:
    texts = [[5, 6, 7, 8] * (n % 3 + 1) for n in range(30)]
    roles = [[1, 1, 2, 2] * (n % 3 + 1) for n in range(30)]
    weights = [[1.0, 1.0, 0.5, 1.0] * (n % 3 + 1) for n in range(30)]
    for name, more in (("plain", None), ("weighed", weights)):
        write_conversations(tmp_path / name, texts, roles, more)
        artifact = read(tokenized(tmp_path / name), chat_template="megatron-llm", added=("<|im_start|>", "<|im_end|>"))
        assert (artifact.content, artifact.documents, artifact.tokens) == ("conversations", 30, sum(map(len, texts)))
        assert artifact.header_tokens > 0
        check_same(artifact, tmp_path / "ws", tmp_path / name)
        data = opened(artifact, tmp_path / "ws")
        assert set(data.train[0].weights.tolist()) == ({0.0, 1.0} if more is None else {0.0, 0.5, 1.0})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: write(f / "d", [7], [8, 320, 9]),
         "data: document 1 has id 320; the tokenizer has vocab_size=320: it is not the one this was made with"),
        (lambda f: write(f / "d", [7], [8], dtype=np.int32),
         "data holds int32, but the ids of a tokenizer with 320 are kept as uint16: it was made with another one"),
        (lambda f: (f / "d.bin").write_bytes((f / "d.bin").read_bytes() + b"\0\0"),
         "data.bin: has 8 bytes, its sequences take 6. Make the dataset again"),
        (lambda f: (f / "d.bin").write_bytes(b"\1\0"), "data.idx: sequence 1 is said to be 2 uint16 tokens at byte 2"),
        (lambda f: (f / "d.idx").write_bytes((f / "d.idx").read_bytes()[:-1]), "it was cut off or damaged. Make the dataset"),
        (lambda f: write(f / "d", []), "there is no token in it"),
    ],
)  # fmt: skip
def test_what_is_not_what_it_should_be(read: Read, tmp_path: Path, spoil: Callable[[Path], Any], told: str) -> None:
    write(tmp_path / "d", [7], [8, 9])
    spoil(tmp_path)
    with pytest.raises(BadInput, match="^the tokenized data d: .*" + re.escape(told)):
        read(tokenized(tmp_path / "d"))


@pytest.mark.parametrize(
    ("roles", "weights", "told"),
    [
        ([[1, 3]], None, "data-role: document 0 has role 3; known are 0 system, 1 prompter and 2 assistant"),
        ([[1, 2]], [[1, -0.5]], "data-weight: document 0 has weight -0.5; a weight is a number from 0 on"),
        ([[1, 2]], [[float("nan"), 1]], "data-weight: document 0 has weight nan; a weight is a number from 0 on"),
        ([[1, 2, 2]], None, "data-role and .*data-text have conversations of other lengths"),
    ],
)
def test_conversations_that_are_none(read: Read, tmp_path: Path, roles: Any, weights: Any, told: str) -> None:
    write_conversations(tmp_path / "d", [[5, 6]], roles, weights)
    with pytest.raises(BadInput, match=told):
        read(tokenized(tmp_path / "d"), chat_template="chatml", added=("<|im_start|>", "<|im_end|>"))


def test_what_is_not_there(read: Read, tmp_path: Path) -> None:
    write(tmp_path / "data", [7])
    write_conversations(tmp_path / "talks", [[5]], [[2]])
    for data, told in (
        (tokenized(tmp_path / "date"),
         f"data.source: there is no dataset {tmp_path}/date, neither .bin and .idx nor -text and -role. "
         f"Name one of: {tmp_path}/data, {tmp_path}/talks-role, {tmp_path}/talks-text"),
        (tokenized(tmp_path / "talks-text.bin"),
         f"data.source: {tmp_path}/talks-text is a stream of conversations, of -text and -role: name their prefix, "
         f"{tmp_path}/talks"),
        ({"blend": [tokenized(tmp_path / "data"), tokenized(tmp_path / "talks")]},
         "data: data.blend[0] is text and data.blend[1] is conversations; a model is trained on one"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=re.escape(told)):
            read(data)
    (tmp_path / "talks-role.bin").unlink()
    with pytest.raises(BadInput, match=r"talks lacks talks-role\.bin: it needs \.bin and \.idx of -text and -role"):
        read(tokenized(tmp_path / "talks"))
    with pytest.raises(ValueError, match="columns is for conversations"):
        DataSettings.model_validate({**tokenized(tmp_path / "data"), "columns": {"messages": "x"}})


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")
@pytest.mark.parametrize("name", ["instruct", "instruct_system"])
def test_conversations_of_the_reference(read: Read, tmp_path: Path, name: str) -> None:
    artifact = read(
        tokenized(GOLDEN / "instruct" / name), model=GOLDEN_TOKENIZER, chat_template="megatron-llm",
        added=("<|im_start|>", "<|im_end|>"),
    )  # fmt: skip
    assert (artifact.documents, artifact.content, artifact.dtype, artifact.empty_documents) == (
        400,
        "conversations",
        "uint16",
        0,
    )
    for stream in ("text", "role"):
        for end in ("bin", "idx"):
            made = artifact.folder(tmp_path / "ws") / f"data-{stream}.{end}"
            assert made.read_bytes() == (GOLDEN / "instruct" / f"{name}-{stream}.{end}").read_bytes()
    text = IndexedDataset(GOLDEN / "instruct" / f"{name}-text")
    assert (artifact.tokens, artifact.sets[0].longest) == (int(text.sizes.sum()), int(text.sizes.max()))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")
def test_text_of_the_reference(read: Read, tmp_path: Path) -> None:
    """Its own files are too large to be here, but their checksums are known, and ours are the same."""
    first = read({"source": str(GOLDEN / "preprocess" / "code.jsonl.gz")}, model=GOLDEN_TOKENIZER, reference_special_text=True)
    expected = next(one for one in json.loads((GOLDEN / "preprocess" / "expected.json").read_text()) if "eod" in one["output"])
    again = read(tokenized(first.folder(tmp_path / "ws") / "data"), model=GOLDEN_TOKENIZER)
    made = again.folder(tmp_path / "ws")
    assert [digest(made / f"data.{end}") for end in ("bin", "idx")] == [expected["bin_sha256"], expected["idx_sha256"]]
    assert again.sets == first.sets
    assert again.tokens == expected["tokens"]
