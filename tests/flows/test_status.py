"""What `finetune status` says, in a workspace of any name."""

from pathlib import Path

import pytest
from stories import done_run

from flows import cli


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
