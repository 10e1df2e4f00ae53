"""verify on the ranks that training has: the ranks are real processes, over gloo."""

import json
import re
from pathlib import Path

import pytest
import torch
from workspaces import Tensors, Workspace, make_workspace, read_canonical, references

from stages import runtime, shard, verify
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import specs
from stages.contracts.train_settings import TrainSettings
from stages.outcomes import GateFailed


def sharded(workspace: Workspace, **layout: int) -> Workspace:
    """The same workspace after shard."""
    spec = specs.ShardSpec(workspace=str(workspace.root), inputs=references({"weights": workspace.weights}), **layout)
    weights = runtime.execute(spec, shard.run)
    assert isinstance(weights, a.WeightsArtifact)
    return Workspace(workspace.root, workspace.model, workspace.dataset, weights)


def test_under_tensor_and_pipeline_parallelism(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Interleaved on two pp ranks; then on two tp ranks, with batches that they cannot share out evenly. The same figures."""
    alone = make_workspace(tmp_path, num_hidden_layers=4, vocab_size=400)
    reports = {}
    for name, workspace in (
        ("alone", alone), ("pp", sharded(alone, pp=2, vpp=2)), ("tp", sharded(alone, tp=2)),
    ):  # fmt: skip
        spec = workspace.verify_spec(batch_size=1, sequence_length=47, batches=3)
        capfd.readouterr()  # what transformers said when it saved the model
        artifact = runtime.execute(spec, verify.run)
        assert capfd.readouterr().err == "", name
        reports[name] = json.loads((spec.folder / "verification.json").read_text())
        assert isinstance(artifact, a.VerificationArtifact)
        axes = {"alone": "", "pp": " · pp 2 · vpp 2", "tp": " · tp 2"}[name]
        assert re.fullmatch(rf"mean \|Δlogit\| \d\.\de-0[678] · argmax 100 % · gate 1e-04{axes}", artifact.figure)
        card = (spec.folder / "verification.md").read_text()
        topology = {"alone": "tp 1 · pp 1 · vpp 1", "pp": "tp 1 · pp 2 · vpp 2", "tp": "tp 2 · pp 1 · vpp 1"}[name]
        assert f"Verdict: passed. Topology: {topology}. Precision: ours fp32, transformers fp32." in card
    assert reports["pp"]["modules"] == reports["alone"]["modules"]  # the same operations, on another rank
    for name in ("pp", "tp"):
        assert reports[name]["loss_ours"] == pytest.approx(reports["alone"]["loss_ours"], rel=1e-6)
        assert [probe["tokens"] for probe in reports[name]["probes"]] == [
            probe["tokens"] for probe in reports["alone"]["probes"]
        ]
        for report in (reports[name], *reports[name]["probes"]):
            assert report["argmax_agreement"] == 1
            assert 0 < report["mean_error"] < 1e-6
        assert [m["module"] for m in reports[name]["modules"]] == [m["module"] for m in reports["alone"]["modules"]]


def test_fault_on_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The ranks find the layer; that the stage has an exit code of its own for it is in `test_verify`."""

    def swap_gate_and_up(weights: Tensors) -> None:
        gate, up = (f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]

    workspace = sharded(make_workspace(tmp_path, edit=swap_gate_and_up), tp=2)
    spec = workspace.verify_spec()
    told = r"(?s)^gate failed at layer 2 \(model\.layers\.2\.mlp\): mean \|Δlogit\|.*gate_proj and up_proj are swapped\."
    with pytest.raises(GateFailed, match=told):
        runtime.execute(spec, verify.run)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not spec.folder.exists()


def test_shards_rounded_to_another_precision(tmp_path: Path) -> None:
    """Training begins with the rounded weights: they are what transformers is given."""
    workspace = make_workspace(tmp_path)
    spec = specs.ShardSpec(workspace=str(workspace.root), inputs=references({"weights": workspace.weights}), dtype="bfloat16")
    weights = runtime.execute(spec, shard.run)
    assert isinstance(weights, a.WeightsArtifact)
    assert weights.model.dtype == "bfloat16"
    told = {
        "tensors": 30,
        "bytes": 287616,
        "exact": 0,
        "rounded": 30,
        "dtypes": ["bfloat16"],
        "differing": [],
        "unexpected": [],
    }
    assert weights.metrics["tensors"] == told
    rounded = Workspace(workspace.root, workspace.model, workspace.dataset, weights)
    artifact = runtime.execute(rounded.verify_spec(), verify.run)
    assert isinstance(artifact, a.VerificationArtifact)
    assert artifact.mean_error < 1e-6
    assert artifact.metrics["tensors"] == told  # found anew, against the source
    assert all(tensor.dtype == torch.float32 for tensor in read_canonical(workspace.source).values())
    assert "30 rounded to bfloat16" in (artifact.folder(tmp_path) / "verification.md").read_text()


def test_the_key_is_of_the_ranks(tmp_path: Path) -> None:
    """Shards of another layout hold the same weights, and a training goes on. The gate is on ranks, and runs again."""
    workspace = make_workspace(tmp_path)
    config = c.PipelineConfig(
        workspace=str(tmp_path),
        model=c.ModelSettings(source="x"),
        data=c.DataSettings(source="x"),
        train=TrainSettings(steps=1),
    )
    keys = set()
    for layout in ({"tp": 1}, {"tp": 2}):
        cut = sharded(workspace, **layout)
        inputs = {"model": cut.model, "weights": cut.weights, "dataset": cut.dataset}
        keys.add(specs.VerifySpec.of(config, **inputs).key)
    assert len(keys) == 2
