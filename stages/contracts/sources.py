"""Local sources: which files a folder of text means, and an identity for them that notices change without reading them."""

import hashlib
import os
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path
from re import Pattern, compile


def list_files(root: Path, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[Path]:
    """The files below a folder whose path matches a pattern of `include` and none of `exclude`, sorted by path.

    Patterns are matched against the path relative to the folder, with `/`: `*` matches anything, `/` too, and a leading
    `**/` also nothing. A folder that is excluded as a whole (`name/**`) is not entered. Links to folders are not followed.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    return sorted(file for file, name in _walk(root, unwanted) if any(p.match(name) for p in wanted))


def stamp(source: str, include: tuple[str, ...] = ("**/*",), exclude: tuple[str, ...] = ()) -> str | None:
    """Identity of a local file or folder: names, sizes and times of its files. None when it is not on this disk."""
    path = Path(source).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else list_files(path, include, exclude)
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _patterns(globs: tuple[str, ...]) -> list[Pattern[str]]:
    return [compile(translate(part)) for glob in globs for part in {glob, glob.removeprefix("**/")}]


def _walk(root: Path, unwanted: list[Pattern[str]]) -> Iterator[tuple[Path, str]]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        prefix = "" if here == root else here.relative_to(root).as_posix() + "/"
        folders[:] = [name for name in folders if not any(p.match(f"{prefix}{name}/") for p in unwanted)]
        for name in files:
            if not any(p.match(prefix + name) for p in unwanted) and (here / name).is_file():
                yield here / name, prefix + name
