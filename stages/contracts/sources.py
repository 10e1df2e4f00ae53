"""Local sources: which files a folder of text means, and an identity for them that notices change without reading them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from re import Pattern, compile


def list_files(root: Path, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[Path]:
    """The files below a folder whose path matches a pattern of `include` and none of `exclude`, sorted by path.

    Patterns are matched against the path relative to the folder, with `/`: `*` matches anything, `/` too, and a leading
    `**/` also nothing. A folder that is excluded as a whole (`name/**`) is not entered. Links to files are files, even where
    they lead nowhere; links to folders are not followed.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    return sorted(file for file, name in _walk(root, unwanted) if any(p.match(name) for p in wanted) and _is_file(file))


def linked_folders(root: Path, exclude: tuple[str, ...] = ()) -> list[Path]:
    """The links to folders that `list_files` does not follow."""
    return sorted(path for path, _ in _walk(root, _patterns(exclude)) if path.is_dir())


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def is_local(source: str) -> bool:
    """Whether a source is on this disk; any other is a name on the Hub, or a mistake."""
    return is_glob(source) or Path(source).expanduser().exists()


def is_glob(source: str) -> bool:
    """Whether a source is a pattern of paths: `corpus/*.jsonl.gz`."""
    return _has_magic(source) and not Path(source).expanduser().exists()


def expand(source: str) -> tuple[Path, list[Path]]:
    """The folder that a pattern of paths begins with, and the files below it that match, sorted by path.

    `*` stays within a folder's level, `**` goes to any below. Hidden files are left out unless the pattern names one. A folder
    that is there is meant, even if its name holds a bracket.
    """
    pattern = Path(source).expanduser()
    root = next(parent for parent in pattern.parents if parent.exists() or not _has_magic(str(parent)))
    rest = pattern.relative_to(root)
    below = rest / "*" if rest.name == "**" else rest  # else folders only, before Python 3.13
    found = sorted(path for path in root.glob(str(below)) if _is_file(path))
    return root, found if _is_hidden(rest) else [path for path in found if not _is_hidden(path.relative_to(root))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _has_magic(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def stamp(source: str, include: tuple[str, ...] = ("**/*",), exclude: tuple[str, ...] = ()) -> str | None:
    """Identity of a local source: names, sizes and times of its files. None when it is not on this disk."""
    path = Path(source).expanduser()
    if is_glob(source):
        root, files = expand(source)
    elif path.exists():
        root, files = (path.parent, [path]) if path.is_file() else (path, list_files(path, include, exclude))
    else:
        return None
    return stamp_files(root, files)


def stamp_files(root: Path, files: Sequence[Path]) -> str:
    """Identity of some files below a folder."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere is download's to refuse
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _patterns(globs: tuple[str, ...]) -> list[Pattern[str]]:
    return [compile(translate(part)) for pattern in globs for part in {pattern, pattern.removeprefix("**/")}]


def _walk(root: Path, unwanted: list[Pattern[str]]) -> Iterator[tuple[Path, str]]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        prefix = "" if here == root else here.relative_to(root).as_posix() + "/"
        folders[:] = [name for name in folders if not any(p.match(f"{prefix}{name}/") for p in unwanted)]
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (
            (here / name, prefix + name) for name in (*files, *links) if not any(p.match(prefix + name) for p in unwanted)
        )
