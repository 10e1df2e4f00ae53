"""What a container sees: run in one, before the stages, with the standard library only, as a stage would be:

    python -m flows.launch.probe WORKSPACE MARKER

It prints one line of JSON: whether the workspace is the launcher's (a file MARKER lies there), whether it can be written to,
how much shared memory and how many GPUs there are, and which code of ours the image holds.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

CODE = ("stages/**/*.py", "megatron_core_impl/**/*.py", "flows/launch/shim.py", "flows/launch/probe.py")  # what images run


def code_digest(root: Path = Path(__file__).parents[2]) -> str:
    """A digest of our code that stages run, on this machine or in an image."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in CODE for file in root.glob(pattern)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def seen(workspace: Path, marker: str) -> dict[str, Any]:
    """What this process sees."""
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "is_visible": (workspace / marker).is_file(),
        "is_writable": os.access(workspace, os.W_OK | os.X_OK),
        "shm_size": shm.f_frsize * shm.f_blocks if shm is not None else 0,
        "gpus": None if Path("/dev/dxg").exists() else len(list(Path("/dev").glob("nvidia[0-9]*"))),  # WSL does not tell
        "code": code_digest(),
    }


if __name__ == "__main__":
    print(json.dumps(seen(Path(sys.argv[1]), sys.argv[2])))
