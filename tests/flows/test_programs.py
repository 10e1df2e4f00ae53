"""`finetune dataset` and `checkpoint`: the command becomes another program of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.launch.environment import python_path


@pytest.mark.parametrize("command", ["dataset", "checkpoint"])
def test_a_folder_that_has_our_name_is_not_run(command: str, tmp_path: Path) -> None:
    foreign = tmp_path / "stages"
    foreign.mkdir()
    for name in ("__init__", command):
        (foreign / f"{name}.py").write_text("raise SystemExit('foreign code was run')\n")
    finetune = [sys.executable, "-P", "-c", "import sys; from flows.cli import main; sys.exit(main())", command]
    ours = {**os.environ, "PYTHONPATH": python_path({})}
    done = subprocess.run(finetune, cwd=tmp_path, env=ours, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"finetune {command} inspect" in done.stdout
