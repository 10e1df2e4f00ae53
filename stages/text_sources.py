"""Text on this disk as documents: a jsonl file, or a folder of source files. One document in memory at a time.

A line of `data.jsonl` is `{"id": …, "text": …}`. What preprocess must judge, a line that is no document, goes through as it
is, so that nothing disappears without being counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.contracts.sources import list_files
from stages.runtime import BadInput

Progress = Callable[[float, float, str], None]  # done, total, text


def json_line(identity: str | int, text: str) -> bytes:
    """A document as a line.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair, which no file in UTF-8 can.
    """
    return json.dumps({"id": identity, "text": text}, ensure_ascii=False).encode() + b"\n"


class JsonLines:
    """The documents of a .jsonl file. A document without an `id` is called by its file and line.

    `counts`: "malformed" lines, which are passed on for preprocess to refuse or to count; "blank" lines, which are left out.
    """

    def __init__(self, path: Path, column: str, progress: Progress) -> None:
        self.path, self.column, self.progress = path, column, progress
        self.counts: Counter[str] = Counter()

    def lines(self) -> Iterator[tuple[bytes, int]]:
        """Each document as a line of `data.jsonl`, and the size of its text in bytes.

        Raises:
            BadInput: the first document lacks the column.
        """
        total, done = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                done += len(raw)
                self.progress(done, total, f"{number:,} lines")
                if not raw.strip():
                    self.counts["blank"] += 1
                    continue
                yield self._line(number, raw)
        if not self.counts.total() - self.counts["blank"]:
            raise BadInput(f"data.source: {self.path} holds no document")

    def _line(self, number: int, raw: bytes) -> tuple[bytes, int]:
        try:
            document = json.loads(raw)
            text = document[self.column]
            line = json_line(_identity(document, f"{self.path.name}:{number}"), text)
            if not isinstance(text, str):
                raise TypeError(f"{self.column} is no text")
        except KeyError:
            if not self.counts["documents"]:
                columns = ", ".join(sorted(document)) or "none"
                raise BadInput(
                    f"data.text_column: line {number} of {self.path} has no {self.column!r}; its keys: {columns}"
                ) from None
        except (ValueError, TypeError, RecursionError):
            pass
        else:
            self.counts["documents"] += 1
            return line, len(text.encode())
        self.counts["malformed"] += 1
        return self._malformed(number, raw), 0

    def _malformed(self, number: int, raw: bytes) -> bytes:
        """A line that preprocess will find malformed: as it is, unless it could be taken for a document there."""
        try:
            json.loads(raw)
        except (ValueError, RecursionError):
            return raw.rstrip(b"\r\n") + b"\n"
        return json.dumps({"id": f"{self.path.name}:{number}", "text": None}).encode() + b"\n"


def _identity(document: dict[str, Any], default: str) -> str | int:
    identity = document.get("id")
    return identity if isinstance(identity, str | int) and not isinstance(identity, bool) else default


class SourceFiles:
    """The text files of a folder whose paths match, in the order of their paths, which are their ids.

    Patterns are those of `sources.list_files`. Symbolic links below the folder are not followed, so that nothing outside is
    read and nothing twice; hidden files and folders, `.git` first of all, are left out unless a pattern of `include` names
    one; and a workspace that lies in the folder is no source.

    `counts`: files left out for being "not UTF-8" or "empty".
    """

    def __init__(
        self, folder: Path, include: tuple[str, ...], exclude: tuple[str, ...], progress: Progress, workspace: Path
    ) -> None:
        self.folder, self.include, self.exclude, self.progress = folder, include, exclude, progress
        self.workspace = workspace if folder in workspace.parents else None
        self.hidden = any(part.startswith(".") for pattern in include for part in pattern.split("/"))
        self.counts: Counter[str] = Counter()

    def lines(self) -> Iterator[tuple[bytes, int]]:
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
            yield json_line(path, text), len(text.encode())
            self.progress(number, len(paths), f"{number:,} of {len(paths):,} files")
        if not self.counts["documents"]:
            raise BadInput(
                f"data.include: none of the {len(paths):,} files that match in {self.folder} is text: "
                + ", ".join(f"{count:,} {what}" for what, count in self.counts.items() if count)
            )

    def paths(self) -> list[str]:
        """Relative paths of the files that match, sorted.

        Raises:
            BadInput: there is none; the message counts what there is.
        """
        found = sorted(self._names(self.include, self.exclude))
        if not found:
            patterns = ", ".join(self.include) + (f" without {', '.join(self.exclude)}" if self.exclude else "")
            files = len(list(self._names(("**/*",), ())))
            raise BadInput(f"data.include: no file of {self.folder} matches {patterns}; it holds {files:,} files")
        return found

    def _names(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[str]:
        for file in list_files(self.folder, include, exclude):
            name = file.relative_to(self.folder).as_posix()
            is_hidden = any(part.startswith(".") for part in name.split("/"))
            if not file.is_symlink() and self.workspace not in file.parents and (self.hidden or not is_hidden):
                yield name
