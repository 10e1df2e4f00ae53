"""Precisions from the stored model to the published one: changed where it is asked for, once, and nowhere else."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from weights_inputs import make_checkpoint, make_model, random_model, ref
from workspaces import make_workspace, rewrite

from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout
from stages import convert, export, merge, runtime, shard
from stages.contracts import artifacts as a
from stages.contracts.specs import ConvertSpec, ExportSpec, MergeSpec, ShardSpec
from stages.outcomes import BadInput, GateFailed

DTYPES = ("float32", "bfloat16", "float16")


def execute(spec: Any, run: Any) -> a.WeightsArtifact:
    artifact = runtime.execute(spec, run)
    assert isinstance(artifact, a.WeightsArtifact)
    return artifact


def converted(workspace: Path, tensors: dict[str, Tensor], dtype: str) -> a.WeightsArtifact:
    model = make_model(workspace, tensors, dtype=dtype)
    return execute(ConvertSpec(workspace=str(workspace), inputs={"model": ref(model)}), convert.run)


def sharded(workspace: Path, weights: a.WeightsArtifact, dtype: str | None = None, tp: int = 2) -> a.WeightsArtifact:
    spec = ShardSpec.model_validate(
        {"workspace": str(workspace), "inputs": {"weights": ref(weights)}, "tp": tp, "dtype": dtype}
    )
    return execute(spec, shard.run)


def merged(workspace: Path, masters: dict[str, Tensor], of: str, dtype: str | None = None) -> a.WeightsArtifact:
    checkpoint = make_checkpoint(workspace, masters, layout=Layout(tp=2, dp=2), dtype=of)
    spec = MergeSpec.model_validate({"workspace": str(workspace), "inputs": {"checkpoint": ref(checkpoint)}, "dtype": dtype})
    return execute(spec, merge.run)


def holds(workspace: Path, artifact: a.WeightsArtifact, expected: dict[str, Tensor]) -> None:
    """The tensors are these, bit for bit, and what the artifact says of their precision is what the files are."""
    reader = open_weights(artifact.folder(workspace))
    assert all(same_bits(reader.read(name), tensor) for name, tensor in expected.items())
    others = {name for name in reader.names if reader.dtype(name).name != artifact.model.dtype}
    counted: dict[str, int] = {}
    for name in others:
        dtype = reader.dtype(name).name
        counted[dtype] = counted.get(dtype, 0) + expected[name].numel()
    assert artifact.other_dtypes == counted


def to(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_unasked(tmp_path: Path, dtype: str) -> None:
    """Least of all to fp32."""
    tensors = to(random_model(dtype=torch.float32), dtype)
    weights = converted(tmp_path, tensors, dtype)
    shards = sharded(tmp_path, weights)
    for artifact in (weights, shards):
        holds(tmp_path, artifact, tensors)
        assert artifact.model.dtype == dtype
    assert shards.figure == "tp 2 · pp 1"
    back = merged(tmp_path, to(tensors, "float32"), of=dtype)
    holds(tmp_path, back, tensors)
    assert back.model.dtype == dtype


@pytest.mark.parametrize(("stored", "wanted"), [pair for pair in product(DTYPES, DTYPES) if pair[0] != pair[1]])
def test_every_direction_at_shard(tmp_path: Path, stored: str, wanted: str) -> None:
    tensors = to(random_model(dtype=torch.float32), stored)
    weights = converted(tmp_path, tensors, stored)
    shards = sharded(tmp_path, weights, wanted)
    holds(tmp_path, shards, to(tensors, wanted))
    assert shards.model.dtype == wanted
    assert shards.figure == f"tp 2 · pp 1 · {stored} → {wanted}"
    assert shards.content != sharded(tmp_path, weights).content, "other weights to start from"


@pytest.mark.parametrize(("of", "wanted"), list(product(DTYPES, DTYPES)))
def test_masters_are_rounded_once(tmp_path: Path, of: str, wanted: str) -> None:
    """Not by way of the model's precision: of these numbers twice rounded some are others."""
    masters = random_model(dtype=torch.float32)
    back = merged(tmp_path, masters, of=of, dtype=wanted)
    holds(tmp_path, back, to(masters, wanted))
    assert back.model.dtype == wanted
    twice = to(to(masters, of), wanted)
    is_lossy = of != "float32" and of != wanted
    assert any(not torch.equal(twice[name], tensor) for name, tensor in to(masters, wanted).items()) == is_lossy


def test_from_fp32_by_bf16_to_the_published_model_is_one_rounding(tmp_path: Path) -> None:
    tensors = random_model(dtype=torch.float32)
    shards = sharded(tmp_path, converted(tmp_path, tensors, "float32"), "bfloat16")
    reader = open_weights(shards.folder(tmp_path))
    masters = {name: reader.read(name, dtype=torch.float32) for name in reader.names}  # as training begins
    holds(tmp_path, merged(tmp_path, masters, of=shards.model.dtype), to(tensors, "bfloat16"))


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = random_model(dtype=torch.float32)
    tensors["model.layers.1.mlp.up_proj.weight"][40, 3] = 70_000.0
    weights = converted(tmp_path, tensors, "float32")
    with pytest.raises(GateFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds numbers that float16 cannot"):
        sharded(tmp_path, weights, "float16")


def test_a_mixed_model_is_told_and_kept_or_made_one(tmp_path: Path) -> None:
    tensors = {name: t.float() if t.dim() == 1 else t for name, t in random_model().items()}
    weights = converted(tmp_path, tensors, "bfloat16")
    kept, one = sharded(tmp_path, weights), sharded(tmp_path, weights, "bfloat16")
    holds(tmp_path, kept, tensors)
    assert kept.other_dtypes == {"float32": 224}
    holds(tmp_path, one, to(tensors, "bfloat16"))
    assert one.other_dtypes == {}
    assert one.content != kept.content


def test_a_cut_does_not_change_what_shards_are_of(tmp_path: Path) -> None:
    weights = converted(tmp_path, random_model(), "bfloat16")
    two, four = sharded(tmp_path, weights), sharded(tmp_path, weights, tp=4)
    assert two.content == four.content == sharded(tmp_path, weights, "bfloat16").content
    assert two.fingerprint != four.fingerprint


# ── Export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def exporting(root: Path, dtype: str, wanted: str | None = None) -> ExportSpec:
    """An export of weights that were merged in a precision, from a model that is float32."""
    workspace = make_workspace(root)
    checkpoint, weights = workspace.train(to(workspace.tensors(), dtype), dtype=dtype)
    return workspace.export_spec(checkpoint, weights, export={"dtype": wanted})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_published_precision(tmp_path: Path, dtype: str) -> None:
    spec = exporting(tmp_path, dtype, dtype)
    artifact = runtime.execute(spec, export.run)
    assert isinstance(artifact, a.ExportArtifact)
    assert artifact.model.dtype == dtype
    folder = artifact.folder(tmp_path) / "model"
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


def test_export_rounds_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"^export\.dtype=float16, and the merged weights are bfloat16: merge the checkpoint with"
    ):
        runtime.execute(exporting(tmp_path, "bfloat16", "float16"), export.run)


def test_weights_that_are_not_what_their_artifact_says(tmp_path: Path) -> None:
    spec = exporting(tmp_path, "float32")
    rewrite(tmp_path / spec.inputs["weights"].path, lambda content: content["model"].update(dtype="bfloat16"))
    inputs = {**spec.inputs, "weights": spec.inputs["weights"].model_copy(update={"fingerprint": None})}
    with pytest.raises(BadInput, match=r"the artifact says dtype=bfloat16, but 143,\d+ numbers in float32 are stored: merge"):
        runtime.execute(spec.model_copy(update={"inputs": inputs}), export.run)
