"""An old result while it is made anew: it is there again unless something good has taken its place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_stages import config, fake_run

from flows.running.replaced import put_back, set_aside
from stages import runtime
from stages.contracts.intact import find_intact
from stages.contracts.specs import DownloadModelSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A result."""
    return runtime.execute(DownloadModelSpec.of(config(tmp_path)), fake_run).folder(tmp_path)


def leave_nothing(folder: Path) -> None:
    pass


def leave_a_damaged_one(folder: Path) -> None:
    folder.mkdir()
    (folder / "artifact.json").write_text("{}")


@pytest.mark.parametrize("leave", [leave_nothing, leave_a_damaged_one])
def test_a_stage_that_fails(folder: Path, leave: Callable[[Path], None]) -> None:
    before = find_intact(folder)

    def do_again() -> None:
        with set_aside(folder, wanted=True):
            assert not folder.exists()
            leave(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        do_again()
    assert find_intact(folder) == before is not None
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".replaced")] == []


def test_one_that_succeeded_before_its_process_died(folder: Path, tmp_path: Path) -> None:
    old = folder.rename(folder.parent / f".{folder.name}.replaced")
    runtime.execute(DownloadModelSpec.of(config(tmp_path)), fake_run)
    put_back(folder)
    assert find_intact(folder) is not None
    assert not old.exists()


def test_one_that_another_has_not_removed_yet(folder: Path) -> None:
    """Who made the new result removes the old one when that is there: it may be at that, or was killed at it."""
    old = folder.parent / f".{folder.name}.replaced"
    shutil.copytree(folder, old)
    (old / "other").touch()
    before = find_intact(folder)
    with set_aside(folder, wanted=True):
        assert find_intact(old) == before
        assert not (old / "other").exists()
