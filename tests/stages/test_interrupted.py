"""shard, merge, export and the saving of a checkpoint, killed at any moment, or out of room: the old state or the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weights_inputs import make_model, random_model, ref

from stages import convert, runtime
from stages.contracts.specs import ConvertSpec

DRIVER = Path(__file__).parent / "interrupted.py"
OPERATIONS = ["shard", "merge", "export", "training"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Fifty kills in all, and some at random times; the checks are the driver's, a process that forks."""
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path, ",".join(OPERATIONS), "14"], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == OPERATIONS
    for seen in found.values():
        check(seen, tmp_path)


def check(seen: dict[str, Any], folder: Path) -> None:
    assert len(seen["at"]) > 8
    assert seen["old"] >= 8
    assert seen["told"]
    for text in seen["told"]:  # of a full disk: the file is named
        assert text.startswith(f"OSError: [Errno 28] No space left on device: '{folder}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user who may become another one")
def test_folder_that_may_not_be_written(tmp_path: Path) -> None:
    model = make_model(tmp_path, random_model())
    spec = ConvertSpec(workspace=str(tmp_path), inputs={"model": ref(model)})
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        try:
            os.seteuid(65534)
            runtime.execute(spec, convert.run)
        except PermissionError as error:
            os._exit(7 if error.filename == str(spec.folder.parent) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not spec.folder.parent.exists()
