"""The folder of training checkpoints: which are there, which is intact, and how one comes to be there whole.

A checkpoint is `step-NNNNNN/`: the sharded form (rank files, and `index.json` with the size and BLAKE3 of each) and
`state.json`, which has those of the index and of itself. It is written as `step-NNNNNN.tmp/`, fsynced, and renamed, so a
folder without `.tmp` is complete as far as a crash can tell; a disk can tell otherwise, so the digests are compared before one
is used. No torch in here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_core_impl.checkpoint.digests import INDEX_FILE, DamagedFile, FileDigest, check_file, file_digest, parse_digests
from megatron_core_impl.checkpoint.durable import sync, sync_tree

STATE_FILE = "state.json"
_PREFIX = "step-"
_UNFINISHED = ".tmp"
_OWN_DIGEST = "blake3"  # of the other fields, as compact JSON sorted by name


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


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a training checkpoint, whatever it is called."""
    return (folder / STATE_FILE).is_file() and (folder / INDEX_FILE).is_file()


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a finished checkpoint, which may have been given another name than its step's.

    Raises:
        DamagedCheckpoint: `state.json` is missing, not JSON, or another step's than that of the folder's name.
    """
    path, named = folder / STATE_FILE, folder.name.removeprefix(_PREFIX)
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not readable: {error}") from None
    step = state.get("step") if isinstance(state, dict) else None
    if named != folder.name and named.isdecimal() and int(named) != step:
        raise DamagedCheckpoint(f"{path} is not the state of step {int(named)}")
    if type(step) is not int or step < 0 or not isinstance(state.get("index"), dict):
        raise DamagedCheckpoint(f"{path} is not the state of a checkpoint")
    if state.pop(_OWN_DIGEST, None) != _digest(state):
        raise DamagedCheckpoint(f"{path} is not what was written: its digest of itself differs")
    return state  # type: ignore[no-any-return]


def recorded_files(folder: Path, state: dict[str, Any]) -> dict[str, FileDigest]:
    """What is recorded of the files of a checkpoint, by name. Checks the index, which tells of the others.

    Raises:
        DamagedCheckpoint: the index is not the one that its state tells of.
    """
    try:
        recorded = parse_digests({INDEX_FILE: state["index"]})
        check_file(folder, INDEX_FILE, recorded[INDEX_FILE], STATE_FILE)
        return recorded | parse_digests(json.loads((folder / INDEX_FILE).read_bytes())["files"])
    except DamagedFile as error:
        raise DamagedCheckpoint(str(error)) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} or {INDEX_FILE} tells no digests: {error}") from None


def check_files(folder: Path, files: dict[str, FileDigest]) -> None:
    """Compare files of a checkpoint with what is recorded of them.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or differs.
    """
    for name, recorded in files.items():
        try:
            check_file(folder, name, recorded, INDEX_FILE)
        except DamagedFile as error:
            raise DamagedCheckpoint(str(error)) from None


def commit(root: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Finish a checkpoint whose other files are written: its state, fsync, rename. Then drop all but the `keep` newest."""
    unfinished, final = unfinished_folder(root, step), step_folder(root, step)
    record = {**state, "index": file_digest(unfinished / INDEX_FILE)._asdict()}
    (unfinished / STATE_FILE).write_text(json.dumps({**record, _OWN_DIGEST: _digest(record)}, indent=1) + "\n")
    sync_tree(unfinished)
    unfinished.rename(final)
    sync(root)
    for old in finished_steps(root)[keep:]:
        step_folder(root, old).rename(unfinished_folder(root, old))  # half of one must not look like one
        shutil.rmtree(unfinished_folder(root, old))


def _digest(state: dict[str, Any]) -> str:
    return blake3(json.dumps(state, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def remove_unfinished(root: Path) -> None:
    """Remove what a killed or failed run was writing."""
    for folder in root.glob(f"{_PREFIX}*{_UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)
