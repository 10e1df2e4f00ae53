"""Inputs of preprocess for its tests: results of download made of what a test gives, and the tokenizers to read them with."""

import json
import zlib
from pathlib import Path

from tiny_tokenizers import CODE

from megatron_core_impl.config import ModelConfig
from stages import preprocess, runtime
from stages.context import Context
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


def malformed(texts: list[str]) -> bytes:
    """Lines of which numbers 3, 50 and 51 are malformed."""
    lines = lines_of(texts).encode().splitlines(keepends=True)
    lines[2], lines[49], lines[50] = b'{"text": "\xff"}\n', b'{"id": 1}\n', b"no json\n"
    return b"".join(lines)


def prepared(
    tmp_path: Path,
    tokenizers: Path,
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
    """Make the results of download, and give the spec of preprocess."""
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


def execute(spec: PreprocessSpec) -> a.DatasetArtifact:
    artifact = runtime.execute(spec, preprocess.run, resumable=True)
    assert isinstance(artifact, a.DatasetArtifact)
    return artifact
