"""Stage download as a process, against a Hub on loopback and against files of this disk."""

import errno
import json
import os
import re
import signal
import subprocess
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from download_runs import (
    CONFIG,
    MODEL,
    TAKEN,
    TOKEN,
    WEIGHTS,
    data_spec,
    done,
    done_here,
    model_spec,
    refused,
    refused_here,
    run,
    start,
)
from hub_server import Blob, HubServer
from processes import wait_until
from safetensors.numpy import load_file, save, save_file

from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.hub_errors import Repo, told

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
    weights = save({"model.norm.weight": np.random.default_rng(0).random((64, 1 << 16), np.float32)})
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
    wait_until(lambda: process.poll() is not None or len(list(snapshots.glob("*/snapshots/*/*"))) >= len(TAKEN) - 1)
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


def test_a_pickle_that_runs_code_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = local_model(tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    error = refused_here(model_spec(tmp_path / "ws", folder, allow_pickle=True))
    assert error == (
        f"model.source: pytorch_model.bin of {folder} is refused: names posix.system, which no file of tensors needs. Nothing "
        "in it was run"
    )
    assert not list(tmp_path.rglob("pwned"))


def test_a_damaged_pickle_is_found(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in WEIGHTS.items()}, folder / "pytorch_model.bin")
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    at = data.index(WEIGHTS["model.embed_tokens.weight"].tobytes())
    data[at + 5] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)
    error = refused_here(model_spec(tmp_path / "ws", folder, allow_pickle=True))
    assert re.fullmatch(
        rf"model.source: pytorch_model.bin of {folder} is refused: pytorch_model/data/\d is damaged: its CRC-32 is "
        r"[0-9a-f]{8}, the archive's directory says [0-9a-f]{8}", error
    )  # fmt: skip


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
    artifact = done_here(spec)
    assert isinstance(artifact, a.ModelArtifact)
    assert set(artifact.files) == {f"files/{name}" for name in TAKEN}
    assert artifact.source == "llama", "no path of this machine"
    assert artifact.revision is None
    (folder / "model.safetensors").write_bytes(b"changed later")
    intact.check_files(spec.folder, artifact, thorough=True)


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
    assert {Path(n).name for n in done_here(spec).files if "safetensors" in n} == {*names, "model.safetensors.index.json"}
    (folder / names[1]).unlink()
    error = refused_here(model_spec(tmp_path / "other", folder))
    assert f"is incomplete: model.safetensors.index.json names {names[1]}, which it does not have" in error


@pytest.mark.parametrize(
    ("missing", "content", "error"),
    [
        ("config.json", None, "has no config.json, so it is no Hugging Face model. It holds: LICENSE.txt, README.md"),
        ("tokenizer.json", None, "has no tokenizer: tokenizer.model or tokenizer.json must lie beside config.json"),
        ("model.safetensors", None, "has no weights, neither model.safetensors nor model.safetensors.index.json"),
        ("model.safetensors", b"x" * 40, "model.safetensors: is truncated or no safetensors file"),
        ("model.safetensors", save({"w": np.ones(4, np.int8)}), "are stored as int8; supported: float32, bfloat16, float16"),
        ("config.json", b"{", "llama/config.json: not JSON"),
        ("config.json", b"[1]", "llama/config.json: is no JSON object"),
        ("config.json", b"null", "llama/config.json: is no JSON object"),
        ("config.json", b"[" * 100_000, "llama/config.json: not JSON: maximum recursion depth exceeded"),
        ("config.json", b"\xff\xfe{}", "llama/config.json: not JSON"),
        ("config.json", json.dumps(CONFIG | {"model_type": ["llama"]}).encode(), "model_type=['llama'] is not supported"),
        ("config.json", json.dumps(CONFIG | {"num_hidden_layers": 9999}).encode(),
         "config.json: num_hidden_layers=9999, and the weights hold 0 layers"),
        ("config.json", json.dumps(CONFIG | {"vocab_size": 10**15}).encode(),
         "config.json: vocab_size=1000000000000000, and the weights hold 16: model.embed_tokens.weight has shape [16, 8]"),
        ("config.json", json.dumps(CONFIG | {"hidden_size": 12}).encode(),
         "config.json: hidden_size=12, and the weights hold 8: model.embed_tokens.weight has shape [16, 8]"),
        ("config.json", json.dumps(CONFIG | {"model_type": "bert"}).encode(), "model_type='bert' is not supported"),
    ],
)  # fmt: skip
def test_incomplete_folder(tmp_path: Path, missing: str, content: bytes | None, error: str) -> None:
    folder = local_model(tmp_path / "llama")
    (folder / missing).unlink()
    if content is not None:
        (folder / missing).write_bytes(content)
    assert error in refused_here(model_spec(tmp_path / "ws", folder))


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({}, "has no weight_map, or an empty one: it must say which file each tensor is in"),
        ([1], "has no weight_map, or an empty one"),
        (None, "has no weight_map, or an empty one"),
        ({"w": 1}, "weight_map has 1 for 'w', which is no name of a file beside it"),
        ({"w": ["a"]}, "weight_map has ['a'] for 'w', which is no name of a file beside it"),
        ({"w": "../../etc/passwd"}, "weight_map has '../../etc/passwd' for 'w', which is no name of a file beside it"),
    ],
)
def test_an_index_that_names_no_files(tmp_path: Path, weight_map: Any, error: str) -> None:
    folder = local_model(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = refused_here(model_spec(tmp_path / "ws", folder))
    assert found.startswith(f"model.source: model.safetensors.index.json of {folder}")
    assert error in found
    index.write_text("[1]")
    assert f"{index}: is no JSON object" in refused_here(model_spec(tmp_path / "ws", folder))


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "llama")
    layers = {f"model.layers.{n}.input_layernorm.weight": np.ones(8, np.float32) for n in range(4)}
    save_file(WEIGHTS | layers, folder / "model.safetensors")
    for says in (3, 5, 9999):
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": says}))
        error = refused_here(model_spec(tmp_path / "ws", folder))
        assert error == f"model.source: {folder}: config.json: num_hidden_layers={says}, and the weights hold 4 layers"


def test_a_path_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local_model(tmp_path / "llama-tiny")
    error = refused_here(model_spec(tmp_path / "ws", tmp_path / "llama_tiny"))
    assert f"model.source: there is no {tmp_path}/llama_tiny. Did you mean {tmp_path}/llama-tiny?" in error
    assert "A name on the Hub is owner/name" in error
    assert "data.source: there is no ./corpus.jsonl. " in refused_here(data_spec(tmp_path / "ws", "./corpus.jsonl"))


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
