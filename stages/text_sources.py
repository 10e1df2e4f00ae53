"""A folder of source files as documents, each file one, as lines `{"id": …, "text": …}`. One document in memory at a time."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.contracts.sources import linked_folders, list_files
from stages.outcomes import BadInput

Progress = Callable[[float, float, str], None]  # done, total, text
Line = tuple[bytes, int]  # a document of `data.jsonl`, and the size of its text in bytes


def text_line(identity: str | int, text: str) -> Line:
    """A document as a line.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair, which no file in UTF-8 can.
    """
    return json.dumps({"id": identity, "text": text}, ensure_ascii=False).encode() + b"\n", len(text.encode())


class SourceFiles:
    """The text files of a folder whose paths match, in the order of their paths, which are their ids.

    Patterns are those of `sources.list_files`. Symbolic links to files are followed, those to folders are not; hidden files and
    folders, `.git` first of all, are left out unless a pattern of `include` names one; and a workspace that lies in the folder
    is no source.

    `counts`: files left out for being "not UTF-8" or "empty", and "links to folders".
    """

    def __init__(
        self, folder: Path, include: tuple[str, ...], exclude: tuple[str, ...], progress: Progress, workspace: Path,
        setting: str = "data.include",
    ) -> None:  # fmt: skip
        self.setting = setting  # as a person calls `include`
        self.folder, self.include, self.exclude, self.progress = folder, include, exclude, progress
        self.workspace = workspace if folder in workspace.parents else None
        self.hidden = any(part.startswith(".") for pattern in include for part in pattern.split("/"))
        self.counts: Counter[str] = Counter()

    def lines(self) -> Iterator[Line]:
        """Each file as a line of `data.jsonl`, and the size of its text in bytes.

        Raises:
            BadInput: no file matches, or none of those that do is text.
        """
        paths = self.paths()
        for number, path in enumerate(paths, start=1):
            try:
                # A byte order mark is no text.
                text = (self.folder / path).read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                self.counts["not UTF-8"] += 1
                continue
            if not text:
                self.counts["empty"] += 1
                continue
            self.counts["documents"] += 1
            yield text_line(path, text)
            self.progress(number, len(paths), f"{number:,} of {len(paths):,} files")
        if not self.counts["documents"]:
            left_out = ", ".join(f"{self.counts[why]:,} {why}" for why in ("not UTF-8", "empty") if self.counts[why])
            raise BadInput(f"{self.setting}: none of the {len(paths):,} files that match in {self.folder} is text: {left_out}")

    def paths(self) -> list[str]:
        """Relative paths of the files that match, sorted.

        Raises:
            BadInput: there is none, and the message counts what there is; or one is a link to nothing.
        """
        found = sorted(self._names(self.include, self.exclude))
        check_links([self.folder / name for name in found], self.setting)
        self.counts["links to folders"] = len(linked_folders(self.folder, self.exclude))
        if not found:
            patterns = ", ".join(self.include) + (f" without {', '.join(self.exclude)}" if self.exclude else "")
            files = len(list(self._names(("**/*",), ())))
            raise BadInput(f"{self.setting}: no file of {self.folder} matches {patterns}; it holds {files:,} files")
        return found

    def _names(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[str]:
        for file in list_files(self.folder, include, exclude):
            name = file.relative_to(self.folder).as_posix()
            is_hidden = any(part.startswith(".") for part in name.split("/"))
            if self.workspace not in file.parents and (self.hidden or not is_hidden):
                yield name


def check_links(files: list[Path], setting: str) -> None:
    """Raises BadInput where a file is a link to nothing."""
    for file in files:
        if not file.exists():
            raise BadInput(f"{setting}: {file} is a link to {file.readlink()}, which is not there. Mend it, or leave it out")
