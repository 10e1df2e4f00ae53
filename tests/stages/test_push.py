"""Stage push as a process: a dry run and a folder."""

import json
from pathlib import Path

import pytest
from push_inputs import CURVE, FILES, WEIGHTS, WITH_CHART, done, push_inputs, push_spec, refused, run, sha256

from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.config import PushSettings
from stages.contracts.specs import Ref


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Ref]:
    return push_inputs(tmp_path / "ws", curve=CURVE)


def test_dry_run_says_what_it_would_do(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    spec = push_spec(tmp_path, inputs, repo="ada/fine", branch="next", tag="v1.0", commit_message="First light")
    code, out, err = run(spec)
    assert code == 0, err
    assert "would upload to a private repo ada/fine, branch next, tagged v1.0, as “First light”:" in out
    assert f"      {len(WEIGHTS) / 1e6:.1f} MB  model.safetensors" in out
    assert f"the model card: {spec.folder / 'README.md'}" in out
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.PushArtifact)
    assert artifact.figure == "dry run: would upload 5 files, 1.3 MB to a private repo ada/fine"
    assert set(artifact.published) == WITH_CHART, "samples.json is not the model's"
    receipt = json.loads((spec.folder / "receipt.json").read_text())
    assert receipt["files"]["model.safetensors"]["sha256"] == sha256(WEIGHTS)
    assert {p.name for p in spec.folder.iterdir()} == {"README.md", "assets", "receipt.json", "artifact.json"}


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    first = done(push_spec(tmp_path, inputs, repo="ada/fine"))
    (tmp_path / "ws/push").rename(tmp_path / "ws/earlier")
    assert done(push_spec(tmp_path, inputs, repo="ada/fine")).fingerprint == first.fingerprint


def test_folder(tmp_path: Path, inputs: dict[str, Ref]) -> None:
    target = tmp_path / "shelf"
    spec = push_spec(tmp_path, inputs, to="folder", folder=str(target))
    artifact = done(spec)
    assert {n: (target / n).read_bytes() for n in FILES if n != "README.md"} == {
        n: c for n, c in FILES.items() if n != "README.md"
    }
    assert "# shelf" in (target / "README.md").read_text()
    assert (target / "assets/loss.png").read_bytes() == (spec.folder / "assets/loss.png").read_bytes()
    assert artifact.target == str(target)
    assert intact.find_reusable(spec.folder) == artifact
    same_size = b"x" * len(FILES["config.json"])
    (target / "config.json").write_bytes(same_size)
    assert intact.find_reusable(spec.folder) is None, "the folder is no longer as it was published"
    assert intact.find_intact(spec.folder) == artifact, "its own files are"
    assert (tmp_path / "ws/ExportArtifact/model/config.json").read_bytes() == FILES["config.json"], "its files are its own"
    (target / "left-over.txt").write_text("of the push before")
    done(spec)
    assert {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()} == WITH_CHART, "replaced as a whole"
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    inputs = push_inputs(tmp_path / "ws")
    target = tmp_path / "home-of-ada"
    target.mkdir()
    (target / "thesis.tex").write_text("ten years of work")
    error = refused(push_spec(tmp_path, inputs, to="folder", folder=str(target)))
    assert f"push.folder: {target} holds something else than an earlier push: thesis.tex. Name another folder" in error
    assert (target / "thesis.tex").exists()
    done(push_spec(tmp_path, inputs, to="folder", folder=str(target), repo="ada/fine"))
    assert (target / "ada/fine/model.safetensors").exists()
    assert (target / "thesis.tex").exists()


def test_another_model_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "shelf"
    first = done(push_spec(tmp_path, push_inputs(tmp_path / "ws"), to="folder", folder=str(target)))
    other = push_inputs(tmp_path / "ws", {**FILES, "model.safetensors": WEIGHTS[::-1]})
    second = done(push_spec(tmp_path, other, to="folder", folder=str(target)))
    assert second.path != first.path
    assert (target / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_changed_export_is_not_published(tmp_path: Path) -> None:
    inputs = push_inputs(tmp_path / "ws")
    weights = tmp_path / "ws/ExportArtifact/model/model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"\0")
    assert "inputs.export: " in refused(push_spec(tmp_path, inputs))


@pytest.mark.parametrize("name", ["feature/x", "v1.0", "a", "release-2"])
def test_names_of_branches_and_tags(name: str) -> None:
    assert PushSettings(branch=name, tag=f"{name}-1").branch == name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"branch": "my branch"}, "branch"), ({"tag": "-f"}, "tag"), ({"tag": "a..b"}, "tag"), ({"branch": "a/"}, "branch"),
        ({"branch": "refs/pr/1"}, "refs/pr/1 must be a plain name"), ({"tag": "main"}, "tag and branch must differ"),
    ],
)  # fmt: skip
def test_names_that_git_refuses_are_told_early(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PushSettings(**settings)
