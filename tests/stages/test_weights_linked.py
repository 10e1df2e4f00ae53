"""convert of a folder that is canonical already: the same files under a second name, and what that must not break."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from weights_inputs import HF, make_model, random_model, ref

from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.sharded import WeightsReader, open_weights
from stages import convert, linked_weights, runtime, shard
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.specs import ConvertSpec, ShardSpec
from stages.outcomes import BadInput, GateFailed


def converted(workspace: Path, model: a.ModelArtifact) -> a.WeightsArtifact:
    artifact = runtime.execute(ConvertSpec(workspace=str(workspace), inputs={"model": ref(model)}), convert.run)
    assert isinstance(artifact, a.WeightsArtifact)
    return artifact


def sharded(workspace: Path, weights: a.WeightsArtifact) -> WeightsReader:
    spec = ShardSpec(workspace=str(workspace), inputs={"weights": ref(weights)}, tp=2)
    return open_weights(runtime.execute(spec, shard.run).folder(workspace))


def is_same(reader: WeightsReader, tensors: dict[str, Tensor]) -> bool:
    """Whether a folder holds exactly these tensors."""
    return set(reader.names) == tensors.keys() and all(same_bits(reader.read(name), t) for name, t in tensors.items())


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)


def test_file_is_shared_and_the_artifact_says_so(tmp_path: Path) -> None:
    tensors = random_model()
    model = make_model(tmp_path, tensors)
    weights = converted(tmp_path, model)
    file = weights.folder(tmp_path) / "model.safetensors"
    assert file.samefile(model.folder(tmp_path) / "files" / "model.safetensors")
    assert weights.figure.endswith("bit for bit, hard-linked")
    assert weights.metrics["hard_linked"] == ["model.safetensors"]
    assert weights.files["model.safetensors"] == model.files["files/model.safetensors"]
    intact.check_files(weights.folder(tmp_path), weights, thorough=True)
    assert is_same(open_weights(weights.folder(tmp_path)), tensors)
    assert is_same(sharded(tmp_path, weights), tensors)


def test_mixed_dtypes_buffers_and_a_tied_copy_are_right_in_a_linked_file(tmp_path: Path) -> None:
    hf = HF | {"tie_word_embeddings": True}
    tensors = {name: t.float() if t.dim() == 1 else t for name, t in random_model(hf).items()}
    beside = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(3)},
    }
    weights = converted(tmp_path, make_model(tmp_path, tensors | beside, hf=hf))
    assert weights.metrics["hard_linked"] == ["model.safetensors"]
    assert (weights.tensors, weights.bytes) == (len(tensors), sum(t.nbytes for t in tensors.values()))
    assert set(load_file(weights.folder(tmp_path) / "model.safetensors")) == tensors.keys() | beside.keys()
    assert is_same(open_weights(weights.folder(tmp_path)), tensors)
    assert is_same(sharded(tmp_path, weights), tensors)


def test_other_file_systems_get_a_copy_of_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_model()
    model = make_model(tmp_path, tensors)
    linked = converted(tmp_path, model)
    shutil.rmtree(linked.folder(tmp_path))
    no_links(monkeypatch)
    copied = converted(tmp_path, model)
    file = copied.folder(tmp_path) / "model.safetensors"
    assert not file.samefile(model.folder(tmp_path) / "files" / "model.safetensors")
    assert copied.figure.endswith("bit for bit")
    assert copied.metrics["hard_linked"] == []
    assert copied.fingerprint == linked.fingerprint  # what comes after it need not run again
    assert is_same(open_weights(copied.folder(tmp_path)), tensors)


def test_copy_that_goes_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_wrongly(source: Path, target: Path) -> None:
        data = bytearray(source.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)

    model = make_model(tmp_path, random_model())
    no_links(monkeypatch)
    monkeypatch.setattr(linked_weights, "copy_file", copy_wrongly)
    with pytest.raises(GateFailed, match=r"^model\.safetensors: its copy differs"):
        converted(tmp_path, model)


def test_result_outlives_the_download_that_it_shares_its_file_with(tmp_path: Path) -> None:
    tensors = random_model()
    model = make_model(tmp_path, tensors)
    weights = converted(tmp_path, model)
    shutil.rmtree(model.folder(tmp_path))
    again = make_model(tmp_path, {name: t + 1 for name, t in tensors.items()})  # as a rerun that finds other weights
    assert again.fingerprint != model.fingerprint
    assert intact.find_intact(weights.folder(tmp_path)) == weights
    assert is_same(sharded(tmp_path, weights), tensors)


def test_change_of_the_shared_file_is_caught_on_both_sides(tmp_path: Path) -> None:
    model = make_model(tmp_path, random_model())
    weights = converted(tmp_path, model)
    with (model.folder(tmp_path) / "files" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert intact.find_intact(model.folder(tmp_path)) is None
    assert intact.find_intact(weights.folder(tmp_path)) is None
    with pytest.raises(BadInput, match=r"inputs\.weights: \S+model\.safetensors: its digest is not the one"):
        sharded(tmp_path, weights)


def test_damaged_download_is_not_linked(tmp_path: Path) -> None:
    """The file is hashed while the stage goes on; what it made of it meanwhile is thrown away."""
    model = make_model(tmp_path, random_model())
    with (model.folder(tmp_path) / "files" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(BadInput, match=r"inputs\.model: \S+model\.safetensors: its digest is not the one"):
        converted(tmp_path, model)
    assert [path.name for path in (tmp_path / "convert").iterdir() if not path.name.endswith(".lock")] == []
