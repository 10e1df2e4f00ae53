"""A result that is being made again: the old one stands aside until the new one is there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.contracts.intact import find_intact


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.replaced"


@contextmanager
def set_aside(folder: Path, *, wanted: bool) -> Iterator[None]:
    """Move a result out of the way, and back if what replaces it fails. Unfinished work stays where it can be resumed."""
    if wanted:
        put_back(folder)  # what another has set aside, and not removed yet, is in the way
    if not wanted or not folder.exists():
        yield
        return
    folder.rename(_aside(folder))
    try:
        yield
    except BaseException:
        put_back(folder)
        raise
    shutil.rmtree(_aside(folder), ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put an old result back where nothing good has replaced it: the process that set it aside was killed, or its stage failed.

    Nobody may be making the result.
    """
    aside = _aside(folder)
    if not aside.exists():
        return
    if find_intact(folder) is not None:
        shutil.rmtree(aside, ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
