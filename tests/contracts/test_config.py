"""The configuration: what is refused, and how clearly."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.contracts.config import PipelineConfig
from stages.contracts.sources import list_files, stamp


def config(**changes: Any) -> PipelineConfig:
    base: dict[str, Any] = {"model": {"source": "a/b"}, "data": {"source": "c/d"}, "train": {"steps": 10}}
    return PipelineConfig.model_validate(base | changes)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"trian": {}}, ("trian",), "Extra inputs"),
        ({"train": {"steps": 10, "optimiser": "x"}}, ("train", "optimiser"), "Extra inputs"),
        ({"train": {"steps": 0}}, ("train", "steps"), "greater than or equal to 1"),
        ({"train": {"steps": 10, "warmup_steps": 10}}, ("train",), "warmup_steps=10 must be less than the 10 steps"),
        ({"train": {"steps": 10, "min_lr": 1.0}}, ("train",), "min_lr=1.0 must not exceed lr="),
        ({"train": {"steps": 10, "split": "1,2"}}, ("train", "split"), "three shares"),
        ({"train": {"steps": 10, "split": "100,0,0"}}, ("train", "split"), "the first two above 0"),
        ({"train": {"steps": 10**24}}, ("train", "steps"), "less than or equal to 1000000000"),
        ({"train": {"steps": 10, "lr": float("inf")}}, ("train", "lr"), "finite number"),
        ({"train": {"steps": 10, "global_batch_size": 7}, "layout": {"dp": 2}}, (), "not a multiple of"),
        ({"train": {"steps": 10, "sequence_length": 9}, "layout": {"tp": 2}}, (), "layout.tp=2 does not divide"),
        ({"layout": {"pp": 2}}, ("layout", "pp"), "Input should be 1"),
        ({"push": {"to": "hub"}}, ("push",), "to=hub needs repo"),
        ({"push": {"to": "folder"}}, ("push",), "to=folder needs folder"),
        ({"push": {"to": "hub", "repo": "no-owner"}}, ("push", "repo"), "match pattern"),
    ],
)
def test_refused(changes: dict[str, Any], where: tuple[str, ...], what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    errors = caught.value.errors()
    assert [e["loc"] for e in errors] == [where]
    assert what in errors[0]["msg"]


def test_every_field_is_described() -> None:
    """The descriptions are the form in the browser and the help of the command line."""
    missing = []

    def walk(model: Any, path: str) -> None:
        for name, field in model.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            if inner is not None:
                walk(field.annotation, f"{path}{name}.")
            elif not field.description:
                missing.append(path + name)

    walk(PipelineConfig, "")
    assert missing == []


def test_list_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "x/c.py", "x/y/d.py", "site-packages/e.py", "x/site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*include: str, exclude: tuple[str, ...] = ()) -> list[str]:
        return [f.relative_to(tmp_path).as_posix() for f in list_files(tmp_path, include, exclude)]

    assert names("**/*.py") == ["a.py", "site-packages/e.py", "x/c.py", "x/site-packages/f.py", "x/y/d.py"]
    assert names("**/*.py", exclude=("site-packages/**",)) == ["a.py", "x/c.py", "x/site-packages/f.py", "x/y/d.py"]
    assert names("**/*.py", exclude=("**/site-packages/**",)) == ["a.py", "x/c.py", "x/y/d.py"]
    assert names("*.txt", "x/*.py", exclude=("**/site-packages/**",)) == ["b.txt", "x/c.py", "x/y/d.py"]


def test_stamp_notices_change(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "note.txt").write_text("1")
    before = stamp(str(tmp_path), ("**/*.py",))
    (tmp_path / "note.txt").write_text("22")
    assert stamp(str(tmp_path), ("**/*.py",)) == before
    (tmp_path / "a.py").write_text("22")
    assert stamp(str(tmp_path), ("**/*.py",)) != before
    assert stamp("some/hub-id") is None
