"""The command `finetune checkpoint`: what inspect and verify print of each form, and with which exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights_inputs import HF, make_checkpoint, make_model, random_model, ref

from megatron_core_impl.checkpoint.safetensors_io import SafetensorsReader, WeightsError
from megatron_core_impl.checkpoint.sharded import open_weights, write_index, write_rank_file
from megatron_core_impl.checkpoint.training import commit, step_folder, unfinished_folder
from megatron_core_impl.config import Layout
from stages import checkpoint, convert, runtime, shard
from stages.contracts import artifacts as a
from stages.contracts.specs import ConvertSpec, ShardSpec
from stages.contracts.words import size

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm" / "llama2_gqa"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of download, convert, shard (tp 2) and train (tp 2, dp 2)."""
    root = tmp_path_factory.mktemp("workspace")
    model = make_model(root, random_model())
    weights = runtime.execute(ConvertSpec(workspace=str(root), inputs={"model": ref(model)}), convert.run)
    runtime.execute(ShardSpec(workspace=str(root), inputs={"weights": ref(weights)}, tp=2), shard.run)
    make_checkpoint(root, random_model(dtype=torch.float32), layout=Layout(tp=2, dp=2))
    return root


def result(workspace: Path, stage: str) -> Path:
    """The folder of a stage's result."""
    (folder,) = (path for path in (workspace / stage).iterdir() if not path.name.startswith("."))
    return folder


@pytest.fixture
def shards(workspace: Path, tmp_path: Path) -> Path:
    """A result of shard to be damaged."""
    return Path(shutil.copytree(result(workspace, "shard"), tmp_path / "shards"))


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What a command prints, on stdout and on stderr."""
    assert checkpoint.main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


# ── inspect ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_in_a_line_for_layers_that_are_alike(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = result(workspace, "shard")
    out, err = told(capsys, "inspect", folder)
    assert err == ""
    index = json.loads((folder / "index.json").read_text())
    first, second = (f"{size(entry['size'])}  {entry['blake3'][:16]}" for entry in index["files"].values())
    assert (
        out
        == f"""\
{folder}
  sharded weights · tp 2
  30 tensors, 42,464 numbers, 84.9 kB in bfloat16

  model.embed_tokens.weight                         bfloat16  300 × 32  2 pieces
  model.layers.0-2.input_layernorm.weight           bfloat16  32
  model.layers.0-2.self_attn.q_proj.weight          bfloat16  32 × 32   2 pieces of 16 × 32
  model.layers.0-2.self_attn.k_proj.weight          bfloat16  16 × 32   2 pieces of 8 × 32
  model.layers.0-2.self_attn.v_proj.weight          bfloat16  16 × 32   2 pieces of 8 × 32
  model.layers.0-2.self_attn.o_proj.weight          bfloat16  32 × 32   2 pieces of 32 × 16
  model.layers.0-2.post_attention_layernorm.weight  bfloat16  32
  model.layers.0-2.mlp.gate_proj.weight             bfloat16  48 × 32   2 pieces of 24 × 32
  model.layers.0-2.mlp.up_proj.weight               bfloat16  48 × 32   2 pieces of 24 × 32
  model.layers.0-2.mlp.down_proj.weight             bfloat16  32 × 48   2 pieces of 32 × 24
  model.norm.weight                                 bfloat16  32
  lm_head.weight                                    bfloat16  300 × 32  2 pieces

  rank-0000.safetensors  {first}
  rank-0001.safetensors  {second}
  BLAKE3 as recorded, begun. The files are not compared with it: finetune checkpoint verify does.
"""
    )


def test_every_tensor_with_its_pieces(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = told(capsys, "inspect", result(workspace, "shard"), "--all")
    lines = out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("  model.layers.1.mlp.down_proj.weight"))
    assert lines[at + 1 : at + 3] == [
        "      rank-0000.safetensors  [0:32, 0:24]",
        "      rank-0001.safetensors  [0:32, 24:48]",
    ]
    assert sum(line.startswith(("  model.", "  lm_head")) for line in lines) == 30


def test_no_tensor_is_read(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(self: SafetensorsReader, name: str, piece: object = None) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsReader, "read", read)
    for stage in ("download", "convert", "shard", "train"):
        told(capsys, "inspect", result(workspace, stage))


def test_training_checkpoint(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the result of train, by its folder of checkpoints, by itself."""
    folder = result(workspace, "train") / "checkpoints" / "step-000002"
    texts = {told(capsys, "inspect", path)[0] for path in (result(workspace, "train"), folder.parent, folder)}
    (out,) = texts
    assert out.startswith(
        f"{folder}\n  sharded weights · tp 2 · dp 2 · step 2\n  60 tensors, 84,928 numbers, 340 kB in float32\n"
    )
    (line,) = (line for line in out.splitlines() if "exp_avg.model.layers.0-2.mlp.down_proj.weight " in line)
    told_of_them = "exp_avg.model.layers.0-2.mlp.down_proj.weight float32 32 × 48 4 pieces of 16 × 24"
    assert " ".join(line.split()) == told_of_them


def test_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_model()
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    out, _ = told(capsys, "inspect", tmp_path)
    assert "  Hugging Face folder\n  30 tensors, 42,464 numbers, 85.0 kB in bfloat16, float32\n" in out
    assert "  model.layers.0,2.input_layernorm.weight           bfloat16  32\n" in out
    assert "  model.layers.1.input_layernorm.weight             float32   32\n" in out
    assert "  No digests are recorded of these files: this form has none.\n" in out


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
def test_checkpoint_of_megatron_llm(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = told(capsys, "inspect", GOLDEN / "tp2pp2")
    assert out.startswith(f"{GOLDEN}/tp2pp2/release\n  Megatron-LLM checkpoint · tp 2 · pp 2\n")
    assert "  encoder.layers.0-1.mlp.dense_4h_to_h.weight               float32  4 × 128 × 88   4 pieces\n" in out


def test_checkpoint_of_meta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.json").write_text("{}")
    for shard_number in (0, 1):
        content = {f"layers.{n}.attention.wq.weight": torch.zeros(4, 8) for n in range(2)} | {"norm.weight": torch.zeros(8)}
        torch.save(content, tmp_path / f"consolidated.{shard_number:02d}.pth")
    out, _ = told(capsys, "inspect", tmp_path)
    assert "  Meta's checkpoint · tp 2\n" in out
    assert "  layers.0-1.attention.wq.weight  float32  2 × 4 × 8  2 pieces\n" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder"),
        ({}, "no weights: neither index.json nor model.safetensors"),
        ({"index.json": "{"}, "index.json: not JSON"),
        ({"model.safetensors": "12"}, "model.safetensors: is truncated or no safetensors file"),
    ],
)
def test_what_cannot_be_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "weights"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    out, err = told(capsys, "inspect", folder, code=checkpoint.BAD)
    assert out == ""
    assert err.startswith(f"error: {folder}")
    assert message in err


def grow(tensor: dict[str, Any]) -> None:
    tensor["shape"], tensor["pieces"][1]["slice"] = [4_000_000, 32], [[16, 4_000_000], [0, 32]]


def swap(tensor: dict[str, Any]) -> None:
    first, second = tensor["pieces"]
    first["file"], second["file"] = second["file"], first["file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            grow,
            "rank-0000.safetensors: W: the index says [0:16, 0:32] of [4000000, 32], the file holds [0:16, 0:32] of [32, 32]",
        ),
        (
            lambda tensor: tensor.update(dtype="float16"),
            "rank-0000.safetensors: W: the index says float16 [16, 32], the file holds bfloat16 [16, 32]",
        ),
        (swap, "rank-0001.safetensors: W: the index says [0:16, 0:32] of [32, 32], the file holds [16:32, 0:32] of [32, 32]"),
    ],
)
def test_an_index_that_lies_is_not_believed(
    shards: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    index, name = shards / "index.json", "model.layers.1.self_attn.q_proj.weight"
    content = json.loads(index.read_text())
    change(content["tensors"][name])
    index.write_text(json.dumps(content))
    _, err = told(capsys, "inspect", shards, code=checkpoint.BAD)
    assert err == f"error: {shards}/{message.replace('W', name)}\n"
    with pytest.raises(WeightsError, match="the index says"):
        open_weights(shards).read(name)


def test_an_index_that_leaves_something_out(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = shards / "index.json"
    content = json.loads(index.read_text())
    del content["tensors"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    _, err = told(capsys, "inspect", shards, code=checkpoint.BAD)
    assert err == f"error: {shards}/rank-0000.safetensors: holds model.norm.weight, of which the index says nothing\n"


def test_a_file_is_no_folder(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "rank-0000.safetensors"
    for command in ("inspect", "verify"):
        _, err = told(capsys, command, path, code=checkpoint.BAD)
        assert err == f"error: {path}: is a file; name the folder that it lies in\n"


def test_result_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], workspace: Path) -> None:
    source = result(workspace, "shard")
    artifact = json.loads((source / a.ARTIFACT_FILE).read_text())
    verification = {key: value for key, value in artifact.items() if key in a.Artifact.model_fields} | {
        "kind": "verification", "stage": "verify", "mean_error": 0, "max_error": 0, "loss_difference": 0,
        "argmax_agreement": 1, "allowed_mean_error": 1, "precision": "fp32",
    }  # fmt: skip
    parsed = a.parse_artifact(json.dumps(verification))
    fingerprint = a.fingerprint_of(parsed.kind, parsed.files, parsed.facts())
    (tmp_path / a.ARTIFACT_FILE).write_text(parsed.model_copy(update={"fingerprint": fingerprint}).model_dump_json())
    _, err = told(capsys, "inspect", tmp_path, code=checkpoint.BAD)
    assert err == f"error: {tmp_path}: is the result of verify, which has no weights in it\n"


# ── verify ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "files"), [("download", 2), ("convert", 2), ("shard", 3), ("train", 5)])
def test_intact(workspace: Path, capsys: pytest.CaptureFixture[str], stage: str, files: int) -> None:
    out, err = told(capsys, "verify", result(workspace, stage))
    *lines, verdict = out.splitlines()
    assert err == ""
    assert len(lines) == files
    assert all(line.endswith("  ok") for line in lines)
    assert f": {files} files, " in verdict
    assert verdict.endswith(": every one is what was written")


def test_altered_file_is_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "rank-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    out, err = told(capsys, "verify", shards, code=checkpoint.DIFFERS)
    recorded = json.loads((shards / "index.json").read_text())["files"][path.name]["blake3"]
    assert [line.split()[0] for line in out.splitlines() if line.endswith("ok")] == ["index.json", "rank-0000.safetensors"]
    assert out.splitlines()[-1].startswith(f"{shards}: 3 files, ")
    assert out.splitlines()[-1].endswith(" kB: 1 is not what was written")
    assert err.startswith(f"error: {path}: its BLAKE3 is ")
    assert err.endswith(f"…, index.json says {recorded[:16]}…\n")


def test_altered_index_is_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own digest is in the artifact."""
    index = shards / "index.json"
    index.write_text(index.read_text().replace('"dp": 1', '"dp": 2'))
    _, err = told(capsys, "verify", shards, code=checkpoint.DIFFERS)
    assert err.startswith(f"error: {index}: its BLAKE3 is ")
    assert "artifact.json says" in err


def test_missing_and_truncated_files_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both, and also where there is no artifact."""
    (shards / a.ARTIFACT_FILE).unlink()
    (shards / "rank-0000.safetensors").unlink()
    path = shards / "rank-0001.safetensors"
    count = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    _, err = told(capsys, "verify", shards, code=checkpoint.DIFFERS)
    assert err == (
        f"error: {shards}/rank-0000.safetensors: missing, and index.json needs it\n"
        f"error: {path}: has {count - 1:,} bytes, index.json says {count:,}\n"
    )


def test_digests_that_begin_alike_are_told_apart(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / a.ARTIFACT_FILE).unlink()
    index = shards / "index.json"
    content = json.loads(index.read_text())
    digest = content["files"]["rank-0001.safetensors"]["blake3"]
    other = digest[:30] + ("0" if digest[30] != "0" else "1") + digest[31:]
    index.write_text(index.read_text().replace(digest, other))
    _, err = told(capsys, "verify", shards, code=checkpoint.DIFFERS)
    assert err == f"error: {shards}/rank-0001.safetensors: its BLAKE3 is {digest[:34]}…, index.json says {other[:34]}…\n"


def test_not_every_file(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What nothing is recorded of is told."""
    (shards / "notes.txt").touch()
    out, _ = told(capsys, "verify", shards)
    assert out.splitlines()[-1].endswith(": what was written; nothing is recorded of notes.txt")
    (shards / a.ARTIFACT_FILE).unlink()
    out, _ = told(capsys, "verify", shards)
    assert out.splitlines()[-1].startswith(f"{shards}: 2 files, ")
    assert out.splitlines()[-1].endswith(": what was written; nothing is recorded of index.json, notes.txt")


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """A training checkpoint whose folder has a name of its own."""
    folder = unfinished_folder(tmp_path, 3)
    folder.mkdir()
    write_rank_file(folder, 0, [("w", (4, 2), ((0, 4), (0, 1)), torch.ones(4, 1))])
    write_rank_file(folder, 1, [("w", (4, 2), ((0, 4), (1, 2)), torch.ones(4, 1))])
    write_index(folder, layout={"tp": 2}, step=3)
    commit(tmp_path, 3, {"step": 3}, keep=9)
    return step_folder(tmp_path, 3).rename(tmp_path / "backup")


def test_checkpoint_of_another_name(backup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told from its state; all of its files are checked, the state by the digest that it has of itself."""
    assert "  training checkpoint · tp 2 · step 3\n" in told(capsys, "inspect", backup)[0]
    out, _ = told(capsys, "verify", backup)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [
        "index.json", "rank-0000.safetensors", "rank-0001.safetensors", "state.json",
    ]  # fmt: skip
    assert ": 4 files, " in out
    assert out.endswith(": every one is what was written\n")
    state = backup / "state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"step": 3', '"step": 4'))
    _, err = told(capsys, "verify", backup, code=checkpoint.DIFFERS)
    assert err == f"error: {state} is not what was written: its digest of itself differs\n"
    state.write_text(whole)
    index = backup / "index.json"
    index.write_text(index.read_text().replace('"step": 3', '"step": 4'))
    _, err = told(capsys, "verify", backup, code=checkpoint.DIFFERS)
    assert err.startswith(f"error: {index}: its BLAKE3 is ")


def test_nothing_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(random_model(HF), tmp_path / "model.safetensors")
    _, err = told(capsys, "verify", tmp_path, code=checkpoint.BAD)
    assert err == f"error: {tmp_path}: no digests are recorded of its files: a Hugging Face folder has none\n"
