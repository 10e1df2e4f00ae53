"""What a flow was given, and what it means: overrides, what is done again, results to start from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config, make_results

from flows.asked.load_config import BadConfig
from flows.asked.parameters import Asked, what_is_asked, what_stage_is_asked, workspace_of
from stages.contracts import artifacts as a


def refused(workspace: Path, **asked: Any) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        what_is_asked(config(workspace), **asked)
    return caught.value.problems


def test_overrides_are_as_after_set(tmp_path: Path) -> None:
    asked = what_is_asked(config(tmp_path), overrides=["train.lr=1e-4", "layout.tp=2", 'export.prompts=["def f("]'])
    assert (asked.config.train.lr, asked.config.layout.tp, asked.config.export.prompts) == (1e-4, 2, ("def f(",))
    as_json = what_is_asked(config(tmp_path).model_dump(mode="json"), overrides=["train.lr=1e-4"])  # a form's fields
    assert as_json.config.train.lr == 1e-4
    assert set(refused(tmp_path, overrides=["train.optimiser=sgd", "train.seed=-1"])) == {
        "overrides: train.optimiser=sgd: unknown key. Did you mean train.optimizer?",
        "overrides: train.seed=-1: -1 must be at least 0",
    }
    [told] = refused(tmp_path, overrides=["train.lr"])
    assert told.startswith("overrides: train.lr: must be key.path=value, e.g. overrides: train.lr=1e-4 or ")
    with pytest.raises(BadConfig) as caught:
        what_is_asked({"model": {"source": "a/b"}, "data": {"source": "c/d"}, "train": {"steps": 2, "lr": -1}})
    assert caught.value.problems == ["config: train.lr: -1 must be greater than 0"]


NO_FOLDERS = {"~nobodyx/w": "Could not determine home directory", "a\0b": "null byte"}  # and what is told of them


@pytest.mark.parametrize("workspace", NO_FOLDERS)
def test_a_workspace_that_cannot_be_a_folder(tmp_path: Path, workspace: str) -> None:
    [told] = refused(tmp_path, overrides=[f"workspace={workspace}"])
    assert told.startswith(f"overrides: workspace={workspace}: {workspace!r} cannot be a folder (")
    assert NO_FOLDERS[workspace] in told
    with pytest.raises(BadConfig, match=r"^workspace: .* cannot be a folder .*: give a path such as ~/workspace$"):
        what_stage_is_asked("train", {}, workspace, overrides=[], start_from=["train/k"], again=False)


def test_the_workspace_of_a_flow_run(tmp_path: Path) -> None:
    given = config(tmp_path).model_dump(mode="json")
    assert workspace_of({"config": given, "overrides": [f"workspace={tmp_path}/other"]}) == tmp_path / "other"
    assert workspace_of({"workspace": str(tmp_path)}) == tmp_path
    strange: list[Any] = [*NO_FOLDERS, 5, None, ["w"]]
    for each in strange:  # on a server, parameters are whatever somebody wrote there
        assert workspace_of({"workspace": each}) is None
        assert workspace_of({"config": {**given, "workspace": each}}) is None
    assert workspace_of({"config": given, "overrides": [5]}) is None


def test_what_is_done_again_takes_what_depends_on_it_along(tmp_path: Path) -> None:
    assert what_is_asked(config(tmp_path), refresh=["merge"]).refresh == {"merge", "export", "push"}
    assert {"download-model", "download-data"} <= what_is_asked(config(tmp_path), refresh=["download"]).refresh
    [told] = refused(tmp_path, refresh=["trian"])
    assert told.startswith("refresh: there is no stage trian. Legal here: ")
    assert refused(tmp_path, fresh=True) == ["fresh: says how to do stages again: name one in refresh"]


@pytest.fixture
def made(tmp_path: Path) -> dict[str, a.Artifact]:
    made = make_results(config(tmp_path))
    (tmp_path / "runs" / "brisk-otter").mkdir(parents=True)
    (tmp_path / "runs" / "brisk-otter" / "train").symlink_to(Path("../..", made["train"].path))
    return made


def given(asked: Asked) -> dict[str, str]:
    return {node: artifact.path for node, artifact in asked.given.items()}


def test_a_result_and_all_it_was_made_from(
    tmp_path: Path, made: dict[str, a.Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {node: made[node].path for node in ("download-model", "download-data", "preprocess", "convert", "shard", "train")}
    other = config(tmp_path, lr=0.5)  # another training: what is there is taken nevertheless
    monkeypatch.chdir(tmp_path)
    for name in (made["train"].path, str(tmp_path / made["train"].path), "runs/brisk-otter/train", "brisk-otter/train"):
        asked = what_is_asked(other, start_from=[name])
        assert given(asked) == wanted
        assert asked.start_from == (made["train"].path,)
    again = what_stage_is_asked(
        "train", {}, str(tmp_path), overrides=[], start_from=[made["shard"].path, made["train"].path], again=True
    )
    assert given(again) == {node: path for node, path in wanted.items() if node != "train"}
    assert (again.refresh, again.start_from) == ({"train"}, (made["shard"].path, made["train"].path))

    shutil.rmtree(tmp_path / made["convert"].path)  # what is gone is made as usual
    assert "convert" not in given(what_is_asked(other, start_from=[made["train"].path]))
    assert refused(tmp_path, start_from=["brisk-otter/train"], refresh=["preprocess"]) == [
        "refresh: preprocess is a result that the run starts from: do it again, or start from it"
    ]


def test_what_is_no_result(tmp_path: Path, made: dict[str, a.Artifact]) -> None:
    [told] = refused(tmp_path, start_from=["brisk-otter/merge"])
    assert told == (
        f"start_from: brisk-otter/merge: no result is there. Name the folder of one, such as {tmp_path}/train/…, or a stage of "
        "a run, such as brisk-otter/train"
    )
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / made["train"].path, elsewhere / made["train"].path)
    [told] = refused(tmp_path, start_from=[str(elsewhere / made["train"].path)])
    assert f" is not of the workspace {tmp_path}. Use the workspace it is in, or copy it to " in told
    other = make_results(config(tmp_path, lr=0.5), until="train")["train"]
    [told] = refused(tmp_path, start_from=[made["train"].path, other.path])
    assert told == f"start_from: {made['train'].path} and {other.path} are both results of train: name one of them"
    (tmp_path / made["train"].path / "content.txt").write_text("something else")
    [told] = refused(tmp_path, start_from=[made["train"].path])
    assert told.startswith(f"start_from: {made['train'].path}: ")
    assert "content.txt" in told
