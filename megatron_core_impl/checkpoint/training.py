"""The folder of training checkpoints: which are there, which is intact, and how one comes to be there whole.

A checkpoint is `step-NNNNNN/`: the sharded form (rank files and `index.json`) and `state.json`, which names every other file
with its size and SHA-256. It is written as `step-NNNNNN.tmp/`, fsynced, and renamed, so a folder without `.tmp` is complete
as far as a crash can tell; a disk can tell otherwise, so the digests are compared before one is used. No torch in here.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.durable import sync, sync_tree

STATE_FILE = "state.json"
_PREFIX = "step-"
_UNFINISHED = ".tmp"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what its state says. The message names the file."""


def step_folder(root: Path, step: int) -> Path:
    """Folder of the finished checkpoint of a step."""
    return root / f"{_PREFIX}{step:06d}"


def unfinished_folder(root: Path, step: int) -> Path:
    """Folder in which the checkpoint of a step is being written."""
    return root / f"{_PREFIX}{step:06d}{_UNFINISHED}"


def finished_steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    names = (path.name.removeprefix(_PREFIX) for path in root.glob(f"{_PREFIX}*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_state(root: Path, step: int) -> dict[str, Any]:
    """The state of a finished checkpoint.

    Raises:
        DamagedCheckpoint: `state.json` is missing, not JSON, or another step's.
    """
    path = step_folder(root, step) / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is not readable: {error}") from None
    if not isinstance(state, dict) or state.get("step") != step or not isinstance(state.get("files"), dict):
        raise DamagedCheckpoint(f"{path} is not the state of step {step}")
    return state


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Compare files with what a checkpoint's state records of them: {name: {"size", "sha256"}}.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or differs.
    """
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if path.stat().st_size != record["size"]:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size:,} bytes, {STATE_FILE} says {record['size']:,}")
        if file_digest(path).hex() != record["sha256"]:
            raise DamagedCheckpoint(f"{path} is not what was written: its SHA-256 differs")


def commit(root: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Finish a checkpoint whose other files are written: its state, fsync, rename. Then drop all but the `keep` newest."""
    unfinished, final = unfinished_folder(root, step), step_folder(root, step)
    (unfinished / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
    sync_tree(unfinished)
    unfinished.rename(final)
    sync(root)
    for old in finished_steps(root)[keep:]:
        shutil.rmtree(step_folder(root, old))


def remove_unfinished(root: Path) -> None:
    """Remove what a killed or failed run was writing."""
    for folder in root.glob(f"{_PREFIX}*{_UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)
