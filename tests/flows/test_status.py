"""What `finetune status` says, in a workspace of any name."""

import shutil
from pathlib import Path

import pytest
from fake_stages import MAKES
from stories import done_run

from flows import cli
from stages.contracts import artifacts as a


@pytest.mark.parametrize("name", ["[draft]", "[/b]", ":smile:", "[link=x]y"])
def test_a_path_is_no_markup(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tmp_path / name
    workspace.mkdir(parents=True)
    assert cli.main(["status", "--workspace", str(workspace)]) == 0
    assert capsys.readouterr().out == f"no runs in {workspace}; start one: finetune run CONFIG.yaml\n"
    folder = done_run(workspace)
    assert cli.main(["status", "brisk-otter", "--workspace", str(workspace)]) == 0
    told = capsys.readouterr().out
    assert f"  train           {workspace}/train/" in told
    assert f"Logs:       {folder.path}/logs\n" in told


def test_where_it_was_published_is_told_as_all_paths_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(to: str, target: str, at: Path) -> str:
        monkeypatch.setitem(MAKES, "push", (a.PushArtifact, {"to": to, "target": target}))
        workspace = tmp_path / to / "workspace"
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True)
        folder = done_run(workspace)
        record = folder.read()
        assert record is not None
        folder.write(record.model_copy(update={"cwd": str(tmp_path / to)}))
        monkeypatch.chdir(at)
        assert cli.main(["status", "brisk-otter", "--workspace", str(workspace)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Published:")]
        return line

    assert told("folder", "workspace/hub/demo", tmp_path / "folder") == "Published:  workspace/hub/demo"
    assert told("folder", "workspace/hub/demo", Path("/usr")) == f"Published:  {tmp_path}/folder/workspace/hub/demo"
    assert told("hub", "me/model", tmp_path / "hub") == "Published:  me/model"
