"""Whether a source is on this disk, and what to say where it is not."""

import difflib
import re
from pathlib import Path

from megatron_core_impl.data.text_files import SUFFIXES
from stages.contracts.sources import is_local
from stages.model_files import listed
from stages.outcomes import BadInput


def local_source(source: str, setting: str) -> Path | None:
    """The file, folder or pattern of paths on this disk that a source means, None when it is a Hub id.

    Raises:
        BadInput: it looks like a path, and nothing is there.
    """
    path = Path(source).expanduser()
    if is_local(source):
        return path
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith((".", "/", "~")) and not source.endswith(SUFFIXES):
        return None
    near = difflib.get_close_matches(path.name, [p.name for p in _inside(path.parent)], n=1)
    if near:
        hint = f"Did you mean {path.parent / near[0]}?"
    elif path.parent.is_dir():
        hint = f"{path.parent.resolve()} holds: {listed({p.name for p in _inside(path.parent)})}"
    else:
        hint = f"Nor is there a folder {path.parent}"
    raise BadInput(f"{setting}: there is no {source}. {hint}. A name on the Hub is owner/name")


def local_name(path: Path) -> str:
    """What an artifact calls a file or folder of this disk: no more of its path than the last name."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
