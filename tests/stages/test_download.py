"""Stage download as a process, against a Hub on loopback and against files of this disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Blob, HubServer
from safetensors.numpy import load_file, save, save_file

from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, Spec
from stages.hub_errors import Repo, told

ROOT = Path(__file__).parents[2]
TOKEN = "hf_testsecretSECRETtestsecret"
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
WEIGHTS = {"model.embed_tokens.weight": np.ones((16, 8), np.float32), "model.norm.weight": np.arange(8, dtype=np.float16)}
CARD = "---\nlicense: other\nlicense_name: llama2\n---\n# A model\n"
MODEL = {
    "config.json": json.dumps(CONFIG), "model.safetensors": save(WEIGHTS), "tokenizer.json": "{}", "README.md": CARD,
    "tokenizer_config.json": '{"model_max_length": 64}', "generation_config.json": '{"a": 1}', "LICENSE.txt": "Be kind.",
    "pytorch_model.bin": b"\x80pickle", "training_args.bin": b"\x80pickle", "original/consolidated.00.pth": b"\x80pickle",
    "onnx/model.safetensors": save(WEIGHTS),
}  # fmt: skip
TAKEN = {
    "config.json", "model.safetensors", "tokenizer.json", "README.md", "tokenizer_config.json", "generation_config.json",
    "LICENSE.txt",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users[TOKEN] = "ada"
        yield server


def model_spec(workspace: Path, source: object, **settings: Any) -> DownloadModelSpec:
    return DownloadModelSpec(workspace=str(workspace), model=ModelSettings(source=str(source), **settings))


def data_spec(workspace: Path, source: object, **settings: Any) -> DownloadDataSpec:
    return DownloadDataSpec(workspace=str(workspace), data=DataSettings(source=str(source), **settings))


def environment(spec: Spec, hub: HubServer | None, token: str | None) -> dict[str, str]:
    """What a stage gets: nothing of this machine's, and no way out but to the test's Hub."""
    settings = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(Path(spec.workspace).parent / "home"),
        "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return settings | ({"HF_TOKEN": token} if token else {})


def start(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> subprocess.Popen[str]:
    """The stage as a process."""
    workspace = Path(spec.workspace)
    workspace.mkdir(exist_ok=True)
    file = workspace / "spec.json"
    file.write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "stages.download", str(file)], text=True, cwd=workspace.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(spec, hub, token) | more,
    )  # fmt: skip


def run(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> tuple[int, str, str]:
    process = start(spec, hub, token, **more)
    out, err = process.communicate(timeout=120)
    assert TOKEN not in out + err, "the token is nobody's business"
    return process.returncode, out, err


def done(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> a.Artifact:
    """The artifact of a run that succeeds."""
    code, out, err = run(spec, hub, token, **more)
    assert code == 0, out + err
    for path in spec.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
        assert not path.is_symlink()
    artifact = a.load_artifact(spec.folder)
    a.check_files(spec.folder, artifact, thorough=True)
    return artifact


def refused(spec: Spec, hub: HubServer | None = None, token: str | None = None, **more: str) -> str:
    """The error of a run that the person must mend: one line, no traceback, no half result."""
    code, out, err = run(spec, hub, token, **more)
    assert code == 2, out + err
    assert "Traceback" not in err
    assert not spec.folder.exists()
    assert not list(spec.folder.parent.glob(".*.partial"))
    return err.strip().splitlines()[-1]


def refused_together(*specs: Spec, hub: HubServer | None, token: str | None = None) -> list[str]:
    """The errors of several runs in one process: loading `datasets` takes a while."""
    code = """
import sys
import traceback
from stages import download, runtime
for file in sys.argv[1:]:
    sys.argv = ["download", file]
    runtime._main({"model": "download-model", "data": "download-data"}, download.run, "", False)
"""
    files = []
    for number, spec in enumerate(specs):
        files.append(Path(spec.workspace) / f"{number}.json")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(spec.model_dump_json())
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, env=environment(specs[0], hub, token)
    )
    assert TOKEN not in process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(specs), process.stderr
    assert not any("a defect of ours" in error for error in errors), process.stderr
    return errors


def documents(spec: Spec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.folder / "data.jsonl").read_text().splitlines()]


# A model from the Hub


def test_model_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add("ada/llama", MODEL)
    spec = model_spec(tmp_path / "ws", "ada/llama")
    artifact = done(spec, hub)
    assert isinstance(artifact, a.ModelArtifact)
    assert set(artifact.files) == {f"files/{name}" for name in TAKEN}, "the rest of the repo stays there"
    assert (spec.folder / "files" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert artifact.revision == repo.branches["main"]
    assert artifact.source == "ada/llama"
    assert artifact.license == "other (llama2)"
    assert artifact.tokenizer_files == ("tokenizer.json", "tokenizer_config.json")
    assert artifact.model.dtype == "float32", "that of most numbers"
    assert artifact.model.parameters == 2 * 16 * 8 + 3 * 8 + (2 * 8 + 2 * 4) * 8 + 3 * 16 * 8
    assert artifact.figure == "856 parameters, vocabulary 16, float32, N B".replace("N", str(len(MODEL["model.safetensors"])))
    assert not any((tmp_path / "ws/.cache/hub").iterdir()), "nothing is kept twice"
    assert not hub.asked("GET", "pytorch_model.bin")


def test_private_model_needs_the_token_which_goes_to_the_hub_only(hub: HubServer, tmp_path: Path) -> None:
    hub.add("ada/secret", MODEL, private=True)
    done(model_spec(tmp_path / "ws", "ada/secret"), hub, TOKEN)
    stored = hub.asked("GET", "/storage/")
    assert stored, "large files come from another host"
    assert all("authorization" not in request.headers for request in stored)
    error = refused(model_spec(tmp_path / "without", "ada/secret"), hub)
    assert "the Hub shows no model ada/secret (401)" in error
    assert f"if it is private, set the environment variable HF_TOKEN to a token from {hub.url}/settings/tokens" in error


def test_gated_model(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add("meta/llama-2", MODEL, gated=True)
    spec = model_spec(tmp_path / "ws", "meta/llama-2")
    assert refused(spec, hub, TOKEN) == (
        f"error: download: the Hub refuses meta/llama-2 (403, gated). Accept its licence at {hub.url}/meta/llama-2 "
        "with the account of this token, or set model.source to a local folder"
    )
    error = refused(spec, hub)
    assert "(401, gated)" in error
    assert "with the account of this token, after you set the environment variable HF_TOKEN" in error
    repo.admitted.add("ada")
    done(spec, hub, TOKEN)


def test_wrong_token(hub: HubServer, tmp_path: Path) -> None:
    hub.add("ada/llama", MODEL)
    spec = model_spec(tmp_path / "ws", "ada/llama")
    code, out, err = run(spec, hub, "hf_wrong")
    assert code == 2
    assert "the Hub does not accept this token (401): it is wrong, expired or revoked. Log in anew: set" in err
    assert "hf_wrong" not in out + err
    assert "HF_TOKEN holds characters that no token has" in refused(spec, hub, "hf with spaces")


def test_missing_repo_and_revision(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add("ada/llama", MODEL)
    repo.branches["fp16"] = repo.branches["main"]
    repo.tags["v1.0"] = repo.branches["main"]
    error = refused(model_spec(tmp_path / "ws", "ada/llama", revision="fp8"), hub)
    assert error == (
        "error: download: ada/llama has no revision 'fp8' (404). Check model.revision; there are: fp16, main, v1.0"
    )
    error = refused(model_spec(tmp_path / "ws", "ada/lama"), hub, TOKEN)
    assert "the Hub shows no model ada/lama (404): check its name" in error
    assert "If model.source is meant as a path, it does not exist" in error
    assert "model.source: " in refused(model_spec(tmp_path / "ws", "ada/lla--ma"), hub)


def test_no_network(tmp_path: Path) -> None:
    error = refused(model_spec(tmp_path / "ws", "ada/llama"))
    assert "cannot reach the Hub at http://127.0.0.1:9 for ada/llama: " in error
    assert "Or set model.source to a local folder" in error
    assert "HF_HUB_OFFLINE forbids it" in refused(model_spec(tmp_path / "ws", "ada/llama"), HF_HUB_OFFLINE="1")


def test_a_cut_connection_is_resumed_within_the_file(hub: HubServer, tmp_path: Path) -> None:
    weights = save({"model.embed_tokens.weight": np.random.default_rng(0).random((64, 1 << 16), np.float32)})
    hub.add("ada/llama", MODEL | {"model.safetensors": weights})
    hub.cuts["model.safetensors"] = [(12 << 20, False)]
    spec = model_spec(tmp_path / "ws", "ada/llama")
    done(spec, hub)
    first, second = hub.asked("GET", "/storage/")
    assert first.range is None
    # The client asks for the rest of what it wrote; bytes that were on their way may come again.
    assert second.status == 206
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", second.range or "")[1]) <= 12 << 20  # type: ignore[index]
    assert (spec.folder / "files/model.safetensors").read_bytes() == weights


def test_a_reset_connection_is_tried_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add("ada/llama", MODEL | {"model.safetensors": save({"model.norm.weight": np.ones(6 << 20, np.float32)})})
    hub.cuts["model.safetensors"] = [(11 << 20, True)]
    spec = model_spec(tmp_path / "ws", "ada/llama")
    code, out, err = run(spec, hub)
    assert code == 0, err
    assert "warning: the connection broke (" in out
    assert "; going on with 1 files" in out, "those that are complete are not fetched again"
    assert len(hub.asked("GET", "/resolve/") + hub.asked("GET", "/storage/")) == len(TAKEN) + 1


def test_stopping_and_going_on(hub: HubServer, tmp_path: Path) -> None:
    big = save({"model.norm.weight": np.ones(16 << 20, np.float32)})
    hub.add("ada/llama", MODEL | {"model.safetensors": big})
    hub.slow.add("model.safetensors")
    spec = model_spec(tmp_path / "ws", "ada/llama")
    process = start(spec, hub)
    snapshots = tmp_path / "ws/.cache/hub" / spec.key
    while len(list(snapshots.glob("*/snapshots/*/*"))) < len(TAKEN) - 1:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4, err
    assert "error: download: stopped by SIGTERM; run it again to go on" in err
    assert not spec.folder.exists()
    hub.slow.clear()
    hub.requests.clear()
    done(spec, hub)
    again = [r.path.split("/")[-1].split("?")[0] for r in hub.requests if r.method == "GET" and "/api/" not in r.path]
    assert again == ["model.safetensors"], "files that were complete are not fetched again"


def test_damage_on_the_way_is_found(hub: HubServer, tmp_path: Path) -> None:
    hub.add("ada/llama", MODEL)
    hub.corrupt.add("model.safetensors")
    spec = model_spec(tmp_path / "ws", "ada/llama")
    assert "model.safetensors of ada/llama arrived damaged: its SHA-256 is not the Hub's. Run again" in refused(spec, hub)
    hub.corrupt.clear()
    done(spec, hub)


def test_large_files_do_not_pass_through_memory(hub: HubServer, tmp_path: Path) -> None:
    size = 320 << 20
    header = json.dumps({"model.norm.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    weights = tmp_path / "weights"
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole: it reads as zeros
    hub.add("ada/llama", MODEL | {"model.safetensors": weights})

    def peak(source: str) -> int:
        process = start(model_spec(tmp_path / "ws", source), hub)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        return usage.ru_maxrss << 10

    hub.add("ada/small", MODEL)
    assert peak("ada/llama") - peak("ada/small") < 64 << 20


def test_pickles_are_refused_unless_asked_for(hub: HubServer, tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value) for name, value in WEIGHTS.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    files = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
    hub.add("ada/old", files | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    error = refused(model_spec(tmp_path / "ws", "ada/old"), hub)
    assert "ada/old has pickled weights only (pytorch_model.bin, training_args.bin), and reading a pickle can run code" in error
    assert "if you trust its author, set model.allow_pickle: true" in error
    spec = model_spec(tmp_path / "ws", "ada/old", allow_pickle=True)
    artifact = done(spec, hub)
    assert {name for name in artifact.files if "model." in name} == {"files/model.safetensors"}, "no pickle goes further"
    stored = load_file(spec.folder / "files/model.safetensors")
    assert all(np.array_equal(stored[name], value) and stored[name].dtype == value.dtype for name, value in WEIGHTS.items())


class Evil:
    """A pickle of this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def test_a_pickle_that_runs_code_runs_nothing(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    error = refused(model_spec(tmp_path / "ws", folder, allow_pickle=True))
    assert "pytorch_model.bin is refused: it holds more than tensors, or is damaged" in error
    assert not list(tmp_path.rglob("pwned"))


# A model from this disk


def local_model(folder: Path) -> Path:
    folder.mkdir()
    for name in TAKEN:
        content = MODEL[name]
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_local_folder(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "llama")
    (folder / "optimizer.pt").write_bytes(b"\x80")
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to("../elsewhere.json")
    spec = model_spec(tmp_path / "ws", folder)
    artifact = done(spec)
    assert isinstance(artifact, a.ModelArtifact)
    assert set(artifact.files) == {f"files/{name}" for name in TAKEN}
    assert artifact.source == "llama", "no path of this machine"
    assert artifact.revision is None
    (folder / "model.safetensors").write_bytes(b"changed later")
    a.check_files(spec.folder, artifact, thorough=True)


def test_local_folder_in_parts(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for (tensor, value), name in zip(WEIGHTS.items(), names, strict=True):
        save_file({tensor: value}, folder / name)
    index = {"metadata": {}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"left over from another day")
    spec = model_spec(tmp_path / "ws", folder)
    assert {Path(n).name for n in done(spec).files if "safetensors" in n} == {*names, "model.safetensors.index.json"}
    (folder / names[1]).unlink()
    error = refused(model_spec(tmp_path / "other", folder))
    assert f"is incomplete: model.safetensors.index.json names {names[1]}, which it does not have" in error


@pytest.mark.parametrize(
    ("missing", "content", "error"),
    [
        ("config.json", None, "has no config.json, so it is no Hugging Face model. It holds: LICENSE.txt, README.md"),
        ("tokenizer.json", None, "has no tokenizer: tokenizer.model or tokenizer.json must lie beside config.json"),
        ("model.safetensors", None, "has no weights, neither model.safetensors nor model.safetensors.index.json"),
        ("model.safetensors", b"x" * 40, "model.safetensors is no intact safetensors file"),
        ("model.safetensors", save({"w": np.ones(4, np.int8)}), "are stored as I8; supported: F32, BF16, F16"),
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", json.dumps(CONFIG | {"model_type": "bert"}).encode(), "model_type='bert' is not supported"),
    ],
)  # fmt: skip
def test_incomplete_folder(tmp_path: Path, missing: str, content: bytes | None, error: str) -> None:
    folder = local_model(tmp_path / "llama")
    (folder / missing).unlink()
    if content is not None:
        (folder / missing).write_bytes(content)
    assert error in refused(model_spec(tmp_path / "ws", folder))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    local_model(tmp_path / "llama-tiny")
    error = refused(model_spec(tmp_path / "ws", tmp_path / "llama_tiny"))
    assert f"model.source: there is no {tmp_path}/llama_tiny. Did you mean {tmp_path}/llama-tiny?" in error
    assert "A name on the Hub is owner/name" in error
    assert "data.source: there is no ./corpus.jsonl. " in refused(data_spec(tmp_path / "ws", "./corpus.jsonl"))


# Text


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def test_dataset_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    julia = {"content": ["f(x) = x", "g(x) = 2x ∘ f"], "id": ["a", "b"], "stars": [1, 2]}
    files = {
        "README.md": "---\nlicense: mit\n---\n", "julia/train-0.parquet": parquet(julia),
        "julia/test-0.parquet": parquet({"content": ["h"], "id": ["c"], "stars": [0]}),
        "python/train-0.parquet": parquet({"content": ["pass"], "id": ["d"], "stars": [0]}),
    }  # fmt: skip
    repo = hub.add("big/code", files, kind="datasets", gated=True)
    wanted = {"data_dir": "julia", "text_column": "content"}
    spec = data_spec(tmp_path / "ws", "big/code", **wanted)
    assert f"Accept its licence at {hub.url}/datasets/big/code with" in refused(spec, hub, TOKEN)
    repo.admitted.add("ada")
    artifact = done(spec, hub, TOKEN)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [{"id": "a", "content": "f(x) = x"}, {"id": "b", "content": "g(x) = 2x ∘ f"}]
    assert "∘" in (spec.folder / "data.jsonl").read_text(), "text is written as it is"
    assert (artifact.documents, artifact.text_bytes) == (2, 8 + 15)
    assert artifact.revision == repo.branches["main"]
    assert artifact.figure == "2 documents, 23 B of text"
    repo.gated = False
    column, split, folder = refused_together(
        data_spec(tmp_path / "ws", "big/code", data_dir="julia"),
        data_spec(tmp_path / "ws", "big/code", split="valid", **wanted),
        data_spec(tmp_path / "ws", "big/code", **(wanted | {"data_dir": "ruby"})),
        hub=hub,
    )
    assert "data.text_column: big/code has no column 'text'. It has: content, id, stars" in column
    assert "data.split: big/code has no split 'valid'. It has: train, test" in split
    assert "data.data_dir: datasets cannot open big/code" in folder


def test_subset_of_a_dataset(hub: HubServer, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: fr\n  data_files: fr/*.jsonl\n---\n"
    lines = ["".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(3)) for word in ("hello", "bonjour")]
    hub.add("ada/words", {"README.md": card, "en/a.jsonl": lines[0], "fr/a.jsonl": lines[1]}, kind="datasets")
    hub.add("ada/damaged", {"a.jsonl": '{"text": "good"}\n' + "x" * 30}, kind="datasets")
    spec = data_spec(tmp_path / "ws", "ada/words", subset="fr")
    done(spec, hub)
    assert documents(spec) == [{"id": n + 1, "text": f"bonjour {n}"} for n in range(3)]
    none, wrong, revision, repo, damaged = refused_together(
        data_spec(tmp_path / "ws", "ada/words"),
        data_spec(tmp_path / "ws", "ada/words", subset="de"),
        data_spec(tmp_path / "ws", "ada/words", revision="v9"),
        data_spec(tmp_path / "ws", "ada/verbs"),
        data_spec(tmp_path / "ws", "ada/damaged"),
        hub=hub,
        token=TOKEN,
    )
    for error in (none, wrong):
        assert "data.subset: datasets cannot open ada/words" in error
        assert "en" in error.split("ada/words")[1]
        assert "fr" in error.split("ada/words")[1]
    assert "ada/words has no revision 'v9' (404). Check data.revision; there are: main" in revision
    assert "the Hub shows no dataset ada/verbs (404)" in repo
    assert "data.source: datasets cannot read row 1 of ada/damaged" in damaged


def test_files_of_records_are_copied_as_they_are(tmp_path: Path) -> None:
    files = {
        "corpus/b.jsonl": b'{"body": "two"}\n\n{not json\n', "corpus/sub/a.jsonl.gz": b"\x1f\x8bwhatever",
        "corpus/.hidden.jsonl": b"{}", "one.parquet": b"PAR1",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for source, names, figure in (
        ("corpus", ["b.jsonl", "sub/a.jsonl.gz"], "2 files, 37 B of text"),
        ("corpus/*.jsonl", ["b.jsonl"], "1 file, 27 B of text"),
        ("corpus/**/*.gz", ["sub/a.jsonl.gz"], "1 file, 10 B of text"),
        ("one.parquet", ["one.parquet"], "1 file, 4 B of text"),
    ):
        spec = data_spec(tmp_path / "ws", tmp_path / source, text_column="body")
        artifact = done(spec)
        assert isinstance(artifact, a.RawDataArtifact)
        (made,) = artifact.sets
        assert (made.name, made.key, made.role, made.text_columns, made.documents) == ("data", "data", "all", ("body",), None)
        assert made.files == tuple(f"data/{name}" for name in names)
        assert made.origins == tuple(name if source == name else f"corpus/{name}" for name in names)
        where = tmp_path if source == "one.parquet" else tmp_path / "corpus"
        for name in names:
            assert (spec.folder / "data" / name).read_bytes() == (where / name).read_bytes()
        assert artifact.figure == figure
    (tmp_path / "empty.jsonl").write_text("")
    assert f"data.source: {tmp_path}/empty.jsonl is empty" in refused(data_spec(tmp_path / "ws", tmp_path / "empty.jsonl"))
    (tmp_path / "corpus.csv").write_text("a,b")
    error = refused(data_spec(tmp_path / "ws", tmp_path / "corpus.csv"))
    assert f"data.source: {tmp_path}/corpus.csv is no file of records. Those are: .jsonl, .ndjson, .json, .jsonl.gz, " in error
    error = refused(data_spec(tmp_path / "ws", tmp_path / "corpus/*.txt"))
    assert (
        f"data.source: no file matches {tmp_path}/corpus/*.txt; {tmp_path}/corpus holds: .hidden.jsonl, b.jsonl, sub" in error
    )


def test_several_sources(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    blend = ({"source": str(tmp_path / "a.jsonl"), "weight": 3.0}, {"source": str(tmp_path / "b.jsonl")})
    settings = DataSettings.model_validate({"blend": blend, "valid": [{"source": str(tmp_path / "held_out.jsonl")}]})
    spec = DownloadDataSpec(workspace=str(tmp_path / "ws"), data=settings)
    artifact = done(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert [(each.name, each.key, each.role, each.files) for each in artifact.sets] == [
        ("data-0", "data.blend[0]", "train", ("data-0/a.jsonl",)), ("data-1", "data.blend[1]", "train", ("data-1/b.jsonl",)),
        ("valid-0", "data.valid[0]", "valid", ("valid-0/held_out.jsonl",)),
    ]  # fmt: skip
    assert artifact.source == "a.jsonl + b.jsonl"
    assert str(tmp_path) not in (spec.folder / "artifact.json").read_text(), "no path of this machine in an artifact"
    other = settings.model_copy(update={"blend": tuple(each.model_copy(update={"weight": 5.0}) for each in settings.blend)})
    assert spec.model_copy(update={"data": other}).key == spec.key, "weights are training's business"
    wrong = DataSettings.model_validate({"source": "ada/x", "valid": [{"source": str(tmp_path / "none.jsonl")}]})
    (tmp_path / "elsewhere").mkdir()
    error = refused(spec.model_copy(update={"data": wrong.model_copy(update={"source": str(tmp_path / "a.jsonl")})}))
    assert f"data.valid[0].source: there is no {tmp_path}/none.jsonl" in error


def test_dataset_that_was_saved_to_disk_and_conversations(tmp_path: Path) -> None:
    import datasets

    talks = [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]
    train = datasets.Dataset.from_list([{"body": "one", "talk": talks, "n": 1}, {"body": "two", "talk": talks, "n": 2}])
    datasets.DatasetDict({"train": train, "held": train.select([1])}).save_to_disk(str(tmp_path / "saved"))
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", text_column="body", split="held")
    assert isinstance(artifact := done(spec), a.RawDataArtifact)
    assert (documents(spec), artifact.sets[0].text_columns) == ([{"id": 1, "body": "two"}], ("body",))
    assert artifact.sets[0].origins == ("saved (held)",)
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", format="sharegpt", columns={"conversations": "talk"})
    done(spec)
    assert documents(spec) == [{"id": 1, "talk": talks}, {"id": 2, "talk": talks}]
    train.save_to_disk(str(tmp_path / "one"))
    split, columns, number, typo = refused_together(
        data_spec(tmp_path / "ws", tmp_path / "saved", split="valid"),
        data_spec(tmp_path / "ws", tmp_path / "saved", format="messages"),
        data_spec(tmp_path / "ws", tmp_path / "saved", text_column="n"),
        data_spec(tmp_path / "ws", tmp_path / "one", text_column="body", split="tset"),
        hub=None,
    )
    assert f"data.text_column: column 'n' of {tmp_path}/saved holds int64, no text. Name another one" in number
    assert f"data.split: {tmp_path}/one has no split 'tset'. It has: train" in typo
    assert f"data.split: {tmp_path}/saved has no split 'valid'. It has: train, held" in split
    assert "data.columns: " in columns
    assert "lacks messages, which format messages needs. It has: body, talk, n" in columns


def test_files_beside_the_data_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    beside = ("README.md", "LICENSE", "_SUCCESS", "sub/_committed_1", "dataset_infos.json", "SHA256SUMS", "a.jsonl.md5")
    for name in ("a.jsonl", "sub/b.json.gz", *beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "_SUCCESS" else b"{}")
    spec = data_spec(tmp_path / "ws", folder)
    code, out, err = run(spec)
    assert code == 0, err
    assert "data.source: left out, as they lie beside the data: LICENSE, README.md, SHA256SUMS, _SUCCESS, a.jsonl.md5, " in out
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.RawDataArtifact)
    assert artifact.sets[0].files == ("data/a.jsonl", "data/sub/b.json.gz")
    assert artifact.figure == "2 files, 4 B of text (left out: 7 beside the data)"


def test_folders_that_cannot_be_meant(tmp_path: Path) -> None:
    def folder(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    mixed = folder("mixed", "a.jsonl", "b.jsonl.gz", "notes/c.txt", "README.md")
    tokens, result = folder("tokens", "x/data.bin", "x/data.idx"), folder("result", "artifact.json", "data.jsonl")
    broken = folder("broken", "a.jsonl")
    (broken / "b.jsonl").symlink_to("gone.jsonl")
    errors = refused_together(
        data_spec(tmp_path / "ws", mixed), data_spec(tmp_path / "ws", tokens), data_spec(tmp_path / "ws", result),
        data_spec(tmp_path / "ws", broken), data_spec(tmp_path / "ws", broken / "*.jsonl"), hub=None,
    )  # fmt: skip
    assert (
        f"data.include: {mixed} holds 2 files of records, say a.jsonl, and 1 others, say notes/c.txt. Name what to read, e.g. "
        'data.include: ["**/*.jsonl"], or what to leave out, e.g. data.exclude: ["**/*.txt"]'
    ) in errors[0]
    assert f"data.include: {tokens} holds tokens (x/data.bin and x/data.idx), not text. Name the text that they" in errors[1]
    assert f"data.include: {result} is the result of a stage, as it holds artifact.json. To read files of records" in errors[2]
    for error, key in ((errors[3], "include"), (errors[4], "source")):
        assert f"data.{key}: {broken}/b.jsonl is a link to gone.jsonl, which is not there. Mend it, or leave it out" in error
    (broken / "b.jsonl").unlink()
    (broken / "b.jsonl").symlink_to(mixed / "a.jsonl")  # as in a snapshot of the Hub's cache
    (broken / "loop").symlink_to(broken, target_is_directory=True)
    spec = data_spec(tmp_path / "ws", broken)
    artifact = done(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert artifact.sets[0].files == ("data/a.jsonl", "data/b.jsonl")
    assert artifact.figure.endswith("(left out: 1 links to folders)")
    settings = folder("program", "package.json", "main.js")
    done(spec := data_spec(tmp_path / "ws", settings))
    assert [document["id"] for document in documents(spec)] == ["main.js", "package.json"]


def test_rows_that_are_no_text_are_for_preprocess_to_count(tmp_path: Path) -> None:
    import datasets

    rows = [{"title": "one", "body": "1", "day": 1}, {"title": None, "body": "2", "day": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", text_column=["title", "body"])
    artifact = done(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [{"id": 1, "title": "one", "body": "1"}, {"id": 2, "title": None, "body": "2"}]
    assert artifact.sets[0].text_columns == ("title", "body")


def test_folder_of_source_files(tmp_path: Path) -> None:
    root = tmp_path / "src"
    files = {
        "b.py": "b = 2\r\n", "a/x.py": "x = 'é'\n", "a/tests/t.py": "t", "c.txt": "c", ".git/hook.py": "no", "a/.x.py": "no",
        "empty.py": "", "a-b.py": "\ufeffc = 3",
    }  # fmt: skip
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    (root / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "outside.py").write_text("linked")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "out").symlink_to(tmp_path, target_is_directory=True)
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    workspace = root / "workspace"
    workspace.mkdir()
    (workspace / "made.py").write_text("by another stage")
    spec = data_spec(workspace, root, include=("**/*.py",), exclude=("**/tests/**",))
    artifact = done(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [
        {"id": "a-b.py", "text": "c = 3"}, {"id": "a/x.py", "text": "x = 'é'\n"}, {"id": "b.py", "text": "b = 2\r\n"},
        {"id": "link.py", "text": "linked"},
    ]  # fmt: skip
    assert artifact.figure == "4 documents, 27 B of text (left out: 2 links to folders, 1 empty, 1 not UTF-8)"
    assert artifact.source == "src"
    hidden = data_spec(workspace, root, include=(".git/*",))
    done(hidden)
    assert [document["id"] for document in documents(hidden)] == [".git/hook.py"], "left out unless named"
    within = data_spec(root, root / "a", include=("*.py",))
    done(within)
    assert [document["id"] for document in documents(within)] == ["tests/t.py", "x.py"], "a folder of the workspace is fine"
    error = refused(data_spec(workspace, root, include=("*.jl", "lib/**"), exclude=("c*",)))
    assert f"data.include: no file of {root} matches *.jl, lib/** without c*; it holds" in error
    assert "is text: 1 not UTF-8" in refused(data_spec(workspace, root, include=("latin*",)))


# What all have in common


@pytest.mark.parametrize("source", ["ada/llama", "corpus.jsonl"])
def test_full_disk(hub: HubServer, tmp_path: Path, source: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        hub.add("ada/llama", MODEL | {"model.safetensors": save({"model.norm.weight": np.ones(1 << 19, np.float32)})})
        (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "x" * (2 << 20)}) + "\n")
        spec = model_spec(disk, source) if "llama" in source else data_spec(disk, tmp_path / source)
        error = refused(spec, hub)
        assert "error: download: no space left" in error
        assert ": make room or choose another workspace, then run again" in error
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_from_within_the_client() -> None:
    def upload() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
        except OSError as error:
            raise RuntimeError("Error while uploading") from error

    with pytest.raises(OSError, match="No space left on device"), told(Repo("model", "ada/llama", "model.source", "")):
        upload()


def test_a_token_inside_an_exception_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo = Repo("model", "ada/llama", "model.source", "")
    with pytest.raises(RuntimeError, match=r"illegal header 'Bearer \*\*\*'") as caught, told(repo):
        raise KeyError(f"illegal header 'Bearer {TOKEN}'")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_blob_hashes_like_git() -> None:
    """The server's own hashes, against git's known one."""
    assert Blob.of("a.txt", b"hello\n").oid == "ce013625030ba8dba906f756967f9e9ca394464a"
