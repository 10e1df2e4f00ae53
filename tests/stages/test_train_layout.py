"""A run whose layout was changed goes on where it was: the stage as the pipeline starts it, with shards of the other layout."""

from pathlib import Path

import pytest
from train_inputs import put_dataset, put_weights, spec_of

from megatron_core_impl import metrics
from stages import runtime, train
from stages.contracts import artifacts as a
from stages.contracts.specs import Ref, TrainSpec


def cut_spec(workspace: Path, **settings: float) -> TrainSpec:
    """The spec of a training whose shards are those of one model, whatever the layout."""
    tp = int(settings.get("tp", 1))
    weights = put_weights(workspace, tp=tp)
    assert isinstance(weights, a.WeightsArtifact)
    spec = spec_of(workspace, weights=weights, dataset=put_dataset(workspace), **settings)  # type: ignore[arg-type]
    ref = Ref(path=weights.path, fingerprint=weights.fingerprint, content=weights.content)
    return spec.model_copy(update={"inputs": {**spec.inputs, "weights": ref}})


def test_goes_on_under_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = cut_spec(tmp_path, dp=2, stop_after_minutes=0.0001)
    with pytest.raises(runtime.Interrupted, match=r"^stopped; saved at step 1; run again to go on from step 1$"):
        runtime.execute(first, train.run, resumable=True)
    second = cut_spec(tmp_path, tp=2)
    assert second.key == first.key
    assert second.inputs["weights"].path != first.inputs["weights"].path
    artifact = runtime.execute(second, train.run, resumable=True)
    assert isinstance(artifact, a.CheckpointArtifact)
    assert "going on from the checkpoint at step 1" in capsys.readouterr().out
    assert (artifact.step, artifact.tp, artifact.dp) == (40, 2, 1)
    assert [line["step"] for line in metrics.read_metrics(artifact.folder(tmp_path)) if "loss" in line] == [*range(1, 41)]


def test_shards_that_are_not_what_the_spec_says(tmp_path: Path) -> None:
    spec = cut_spec(tmp_path)
    ref = spec.inputs["weights"].model_copy(update={"content": "other"})
    other = spec.model_copy(update={"inputs": {**spec.inputs, "weights": ref}})
    with pytest.raises(runtime.BadInput, match=r"inputs\.weights: .* does not hold content other: leave that out of the spec"):
        runtime.execute(other, train.run, resumable=True)
