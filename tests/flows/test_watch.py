"""The watcher beside a run."""

import os
from pathlib import Path
from uuid import UUID

import pytest
from processes import children, wait_until

from flows.launch.environment import source_root
from flows.records.run_record import RunFolder
from flows.running.watch import watched


def watchers() -> list[int]:
    return [pid for pid in children(os.getpid()) if b"flows.running.settle" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_it_finds_our_package_wherever_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A work pool's worker runs a flow in a folder that only it has on its path."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with watched(RunFolder(tmp_path, "run"), str(UUID(int=1)), 1):
        wait_until(lambda: watchers() != [])  # a child is what we are until its program has begun
        [pid] = watchers()
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    assert f"PYTHONPATH={source_root()}{os.pathsep}/elsewhere" in environment
    assert not Path(f"/proc/{pid}").exists()
