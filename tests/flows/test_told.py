"""The flows of single stages: what results tell of a configuration, so that a stage done again is the same work."""

from pathlib import Path
from typing import Any

import pytest
from fake_stages import make_results

from flows.asked.load_config import BadConfig, given_config
from flows.asked.parameters import what_stage_is_asked
from stages.contracts import artifacts as a
from stages.contracts.specs import SOURCES, SPECS, ShardSpec

PLAIN: dict[str, Any] = {
    "model": {"source": "somebody/model"},
    "data": {"blend": [{"source": "somebody/data"}, {"source": "somebody/more"}]},
    "train": {"steps": 2, "sequence_length": 16},
}
OTHER: dict[str, Any] = {  # every section with something that is no default, the downloads the same
    "model": {"source": "somebody/model", "added_tokens": ["<x>"], "new_rows": "zeros", "dtype": "bfloat16"},
    "data": {"blend": [{"source": "somebody/data"}, {"source": "somebody/more", "weight": 3.0}]},
    "preprocess": {"tokenizer": "huggingface", "bos_eos": "both"},
    "verify": {"batches": 1},
    "layout": {"tp": 2, "dp": 2},
    "train": {"steps": 3, "sequence_length": 16, "lr": 1e-4, "global_batch_size": 8},
    "export": {"dtype": "float16", "override_special_tokens": {"eos": "</s>"}, "prompts": ["def f("]},
    "push": {"commit_message": "ours"},
}
NODES = [node for node in SPECS if SOURCES[node]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("told")


@pytest.fixture(scope="module")
def made(workspace: Path) -> dict[str, a.Artifact]:
    """The results of OTHER, in a workspace whose downloads were made for something else."""
    make_results(given_config({**PLAIN, "workspace": str(workspace)}), until="download-data")
    return make_results(given_config({**OTHER, "workspace": str(workspace)}))


def asked(workspace: Path, node: str, *start_from: str, overrides: tuple[str, ...] = (), **sections: Any) -> Any:
    return what_stage_is_asked(node, sections, str(workspace), overrides=overrides, start_from=start_from, again=False)


@pytest.mark.parametrize("node", NODES)
def test_where_nothing_is_overridden_it_is_the_same_work(node: str, workspace: Path, made: dict[str, a.Artifact]) -> None:
    own = [made[node].path] + ([made["convert"].path] if node == "preprocess" else [])
    found = asked(workspace, node, *own)
    inputs = {name: found.given[source] for name, source in SOURCES[node].items()}
    spec = SPECS[node].of(found.config, **inputs)
    assert spec.record() == made[node].spec
    assert spec.key == made[node].key


def test_what_later_results_tell_of_a_stage(workspace: Path, made: dict[str, a.Artifact]) -> None:
    trained = asked(workspace, "train", made["train"].path, overrides=("train.lr=2e-4",)).config
    assert (trained.train.steps, trained.train.lr, trained.layout.world_size) == (3, 2e-4, 4)
    assert [source.weight for source in trained.data.blend] == [1.0, 3.0]
    cut = asked(workspace, "train", made["shard"].path, made["preprocess"].path, train={"steps": 5},
                overrides=("data.blend[0].weight=1", "data.blend[1].weight=2")).config  # fmt: skip
    assert (cut.layout.tp, cut.layout.dp, cut.train.steps, cut.model.dtype) == (2, 1, 5, "bfloat16")
    before = asked(workspace, "shard", made["export"].path, overrides=("layout.tp=1",))
    spec = ShardSpec.of(before.config, weights=before.given["convert"])
    assert (spec.tp, spec.dtype) == (1, "bfloat16")
    assert asked(workspace, "merge", made["export"].path).config.export.dtype == "float16"


@pytest.mark.parametrize(
    ("node", "of", "overrides", "told"),
    [
        ("train", ["shard", "preprocess"], ("train.steps=2",), [
            'data.blend[0].weight: the results do not tell it: set it, e.g. overrides=["data.blend[0].weight=1"]',
            'data.blend[1].weight: the results do not tell it: set it, e.g. overrides=["data.blend[1].weight=1"]',
        ]),
        ("train", ["shard", "preprocess"], (), ["config: train: missing. It is needed"]),
        ("export", ["merge"], ("workspace=elsewhere",), ["overrides: workspace is a parameter of its own: leave it out here"]),
        ("push", ["export"], (), ["start_from: push needs a result of verify, and"]),
    ],
)  # fmt: skip
def test_what_no_result_tells_is_asked_for(
    node: str, of: list[str], overrides: tuple[str, ...], told: list[str], workspace: Path, made: dict[str, a.Artifact]
) -> None:
    with pytest.raises(BadConfig) as caught:
        asked(workspace, node, *(made[each].path for each in of), overrides=overrides)
    assert [line[: len(told[at])] for at, line in enumerate(caught.value.problems)] == told


def test_a_folder_that_was_published_to_is_asked_for(workspace: Path, made: dict[str, a.Artifact]) -> None:
    """A kept spec has only its name; taken for a path it would be another folder."""
    published = OTHER | {"push": {"to": "folder", "folder": str(workspace / "hub")}, "workspace": str(workspace)}
    pushed = make_results(given_config(published))["push"]
    with pytest.raises(BadConfig, match="push: to=folder needs folder"):
        asked(workspace, "push", pushed.path)
