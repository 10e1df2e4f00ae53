"""Which files a path means: a dataset of text, or the streams of conversations. Only names are looked at, nothing is read.

A path is the prefix of a dataset, or one of its two files. A dataset of text is `<prefix>.bin` and `<prefix>.idx`; one of
conversations has these for each of its streams, of which the text and the roles must be there (see `conversation_encoder`).
"""

from pathlib import Path
from typing import Literal, NamedTuple

TEXT, ROLE, WEIGHT = "-text", "-role", "-weight"


class Streams(NamedTuple):
    """A dataset on disk: `<prefix><suffix>.bin` and `.idx` for each suffix."""

    prefix: Path
    suffixes: tuple[str, ...]  # ("",) of text; of conversations those of their streams, the text first

    @property
    def content(self) -> Literal["text", "conversations"]:
        return "text" if self.suffixes == ("",) else "conversations"

    @property
    def prefixes(self) -> tuple[Path, ...]:
        """Of each stream."""
        return tuple(Path(f"{self.prefix}{suffix}") for suffix in self.suffixes)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for prefix in self.prefixes for path in (bin_path(prefix), idx_path(prefix)))


def bin_path(prefix: Path | str) -> Path:
    """Path of a dataset's tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """Path of a dataset's index."""
    return Path(f"{prefix}.idx")


def prefix_of(path: Path | str) -> Path:
    """The prefix that a path means: itself, or that of the file."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def find_streams(path: Path | str) -> Streams:
    """The dataset that a path means. A stream that is named itself is a dataset of its own.

    Raises:
        FileNotFoundError: there is none, or one of its files is missing; the message says which, and what is there.
    """
    prefix = prefix_of(path)
    found = [suffix for suffix in ("", TEXT, ROLE, WEIGHT) if _has_a_file(f"{prefix}{suffix}")]
    if not found:
        raise FileNotFoundError(f"there is no dataset {prefix}, neither .bin and .idx nor {TEXT} and {ROLE}. {_near(prefix)}")
    suffixes = ("",) if "" in found else (TEXT, ROLE, WEIGHT) if WEIGHT in found else (TEXT, ROLE)
    streams = Streams(prefix, suffixes)
    if missing := [file.name for file in streams.files if not file.is_file()]:
        needed = ".bin and .idx" if suffixes == ("",) else f".bin and .idx of {' and '.join(suffixes)}"
        raise FileNotFoundError(f"{prefix} lacks {', '.join(missing)}: it needs {needed}")
    return streams


def _has_a_file(prefix: str) -> bool:
    return bin_path(prefix).is_file() or idx_path(prefix).is_file()


def _near(prefix: Path) -> str:
    """What to name instead."""
    folder = prefix if prefix.is_dir() else prefix.parent
    if not folder.is_dir():
        return f"Nor is there a folder {folder}"
    names = sorted(str(folder / path.stem) for path in folder.glob("*.idx"))
    if not names:
        return f"{folder} has no file that ends in .idx"
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"Name one of: {', '.join(names[:10])}{more}"
