"""Malformed files raise our error, naming the file, or are read; never a crash, a hang, a wrong answer or a huge allocation."""

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).parent / "fuzz_readers.py"
COUNT = 1000  # of each kind


def test_changed_files_are_refused_or_read(tmp_path: Path) -> None:
    """In a process of its own, which may take little memory; the checks are the driver's."""
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path, str(COUNT)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {"index.json", "state.json", "safetensors", "rank file", "index of the Hub", ".idx"}
    for name, counts in found.items():
        assert counts["refused"] + counts["read"] == COUNT, name
        assert counts["refused"] > COUNT / 2, name  # the changes do harm
