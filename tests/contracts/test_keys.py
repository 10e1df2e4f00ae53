"""Keys: the same work has the same key, other work another one, and paths and pace of work do not count."""

from typing import Any

import pytest

from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import SOURCES, SPECS, ConvertSpec, DownloadModelSpec, MergeSpec, Ref, ShardSpec, TrainSpec


def config(**changes: Any) -> PipelineConfig:
    base: dict[str, Any] = {"model": {"source": "a/b"}, "data": {"source": "c/d"}, "train": {"steps": 10}}
    return PipelineConfig.model_validate(base | changes)


def spec(config: PipelineConfig, fingerprint: str = "f") -> TrainSpec:
    inputs = {name: Ref(path=f"x/{name}", fingerprint=fingerprint) for name in TrainSpec.INPUTS}
    return TrainSpec(workspace=str(config.workspace_path), inputs=inputs, **TrainSpec.settings_of(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"steps": 10, "lr": 1e-3}},
        {"train": {"steps": 10, "seed": 1}},
        {"train": {"steps": 10, "optimizer": "sgd"}},
        {"train": {"steps": 10, "reset_attention_mask": True}},
    ],
)
def test_settings_change_the_key(changes: dict[str, Any]) -> None:
    assert spec(config(**changes)).key != spec(config()).key


@pytest.mark.parametrize(
    "changes",
    [
        {"workspace": "elsewhere"},
        {"train": {"steps": 10, "log_interval": 3}},
        {"train": {"steps": 10, "micro_batch_size": 2}},
        {"train": {"steps": 10, "recompute": "full", "recompute_layers_per_unit": 2}},
        {"train": {"steps": 10, "compile": True}},
        {"train": {"steps": 10, "overlap": False, "attention_kernel": "sdpa"}},
        {"train": {"steps": 10, "stop_after_minutes": 3.5, "max_skipped_steps": 5}},
        {"preprocess": {"workers": 7}},
        {"layout": {"tp": 2, "pp": 2, "dp": 2, "vpp": 2}},
    ],
)
def test_paths_and_pace_do_not(changes: dict[str, Any]) -> None:
    assert spec(config(**changes)).key == spec(config()).key


def test_the_micro_batch_counts_where_the_loss_is_defined_by_it() -> None:
    reference = {"steps": 10, "reference_loss_mean": True}
    assert spec(config(train=reference | {"micro_batch_size": 2})).key != spec(config(train=reference)).key


def test_shards_are_cut_for_the_layout() -> None:
    layout = config(layout={"tp": 2, "pp": 4, "dp": 2, "vpp": 2})
    assert ShardSpec.settings_of(layout) == {"tp": 2, "pp": 4, "vpp": 2, "dtype": None}


def test_a_training_goes_on_under_another_layout() -> None:
    """Shards of another layout are other files, but the same weights: the same key, and so the same checkpoints."""

    def key(fingerprint: str, content: str | None) -> str:
        inputs = {"weights": Ref(path="x", fingerprint=fingerprint, content=content), "dataset": Ref(path="y", fingerprint="d")}
        return TrainSpec(workspace="/w", inputs=inputs, **TrainSpec.settings_of(config())).key

    assert key("f", "c") == key("g", "c")
    assert key("f", "c") != key("f", "d")
    assert key("f", None) != key("g", None)


def test_what_changes_how_weights_are_kept() -> None:
    base = config()
    half = config(model={"source": "a/b", "dtype": "bfloat16"})
    assert ShardSpec.of(half, weights=weights()).key != ShardSpec.of(base, weights=weights()).key
    assert ShardSpec.of(half, weights=weights()).dtype == "bfloat16"
    assert DownloadModelSpec.of(half).key == DownloadModelSpec.of(base).key
    whole = config(export={"dtype": "float32"})
    assert MergeSpec.settings_of(whole) == {"dtype": "float32"}
    assert ShardSpec.settings_of(whole) == ShardSpec.settings_of(base)


def test_what_new_rows_begin_as_only_counts_where_there_are_some() -> None:
    tokens = {"source": "a/b", "added_tokens": ["<|x|>"]}
    drawn = config(model=tokens | {"new_rows": "normal"})
    assert ConvertSpec.settings_of(drawn)["new_rows"] == "normal"
    assert ConvertSpec.settings_of(config()) == {}
    assert DownloadModelSpec.of(drawn).key == DownloadModelSpec.of(config(model=tokens)).key


def weights() -> a.WeightsArtifact:
    """Enough of an artifact to be referred to."""
    return a.WeightsArtifact.model_construct(path="convert/k", fingerprint="f", content=None)


def test_inputs_count_by_content() -> None:
    assert spec(config(), "f").key != spec(config(), "g").key
    moved = spec(config()).model_copy(update={"inputs": {n: Ref(path="y", fingerprint="f") for n in TrainSpec.INPUTS}})
    assert moved.key == spec(config()).key


def test_a_setting_with_its_default_is_the_same_as_none() -> None:
    assert spec(config(train={"steps": 10, "clip_grad": 1.0})).key == spec(config()).key


def test_hub_revision_counts() -> None:
    one = DownloadModelSpec.of(config(model={"source": "a/b", "revision": "v1"}))
    two = DownloadModelSpec.of(config(model={"source": "a/b", "revision": "v2"}))
    assert one.key != two.key
    assert one.path == f"download/{one.key}"


@pytest.mark.parametrize(
    ("train", "layout", "message"),
    [
        (
            {"global_batch_size": 6, "micro_batch_size": 2},
            {"dp": 2},
            "not a multiple of train.micro_batch_size × layout.dp = 2 × 2",
        ),
        ({"sequence_length": 15}, {"tp": 2}, "layout.tp=2 does not divide the 1 × 15 tokens of a micro batch"),
    ],
)
def test_a_spec_by_hand_has_batches_that_fit(train: dict[str, int], layout: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSpec.model_validate({"workspace": "/w", "settings": {"steps": 1, **train}, "layout": layout})


def test_graph_is_complete() -> None:
    """Every input of every spec has a source that comes earlier and makes that kind of artifact."""
    made: dict[str, type[a.Artifact]] = {
        "download-model": a.ModelArtifact, "download-data": a.RawDataArtifact, "preprocess": a.DatasetArtifact,
        "convert": a.WeightsArtifact, "verify": a.VerificationArtifact, "shard": a.WeightsArtifact,
        "train": a.CheckpointArtifact, "merge": a.WeightsArtifact, "export": a.ExportArtifact, "push": a.PushArtifact,
    }  # fmt: skip
    order = list(SPECS)
    for node, cls in SPECS.items():
        assert set(SOURCES[node]) == set(cls.INPUTS)
        for name, source in SOURCES[node].items():
            assert order.index(source) < order.index(node)
            assert made[source] is cls.INPUTS[name]
