"""What the base model's licence asks of whoever passes a model on that was made from it: in its own words, nothing added.

Read is what can be read for certain: three demands of Meta's community licences, whose wording has been the same since Llama 2.
Of any other licence the card only says which files it came as.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.model_files import LICENCE_FILES

NOTICE = "NOTICE"
_NOTICE = re.compile(r'within a "Notice" text file distributed as a part of such copies: "([^"]{1,400})"')
_DISPLAY = re.compile(r'prominently display "([^"]{1,80})"')
_NAME = re.compile(r'include "([^"]{1,40})" at the beginning of any such AI model name')


@dataclass(frozen=True)
class Terms:
    """The files of a licence, and what one of them asks for."""

    files: tuple[str, ...] = ()  # names, sorted
    source: str | None = None  # the one that the rest is read from
    notice: str | None = None  # words that a "Notice" file must hold
    display: str | None = None  # words to be shown
    name: str | None = None  # what the name of the model must begin with

    @property
    def has_notice(self) -> bool:
        """Whether the base model brought such a file itself."""
        return any(name.upper().startswith(NOTICE) for name in self.files)


def read_terms(files: Mapping[str, Path]) -> Terms:
    """The terms among the files of a model, by name."""
    names = tuple(sorted(name for name in files if LICENCE_FILES.fullmatch(name)))
    for name in names:
        text = files[name].read_text(errors="replace").replace("“", '"').replace("”", '"')
        text = " ".join(text.split())
        found = [match[1].strip() if (match := pattern.search(text)) else None for pattern in (_NOTICE, _DISPLAY, _NAME)]
        if any(found):
            return Terms(names, name, *found)
    return Terms(names)


def licence_section(license_name: str | None, terms: Terms) -> list[str]:
    """The card's section, as lines of Markdown."""
    named = f"That of the base model: {license_name}." if license_name else "The base model's card names none; its terms apply."
    if not terms.files:
        return [named]
    links = ", ".join(f"[{name}]({name})" for name in terms.files)
    lines = [f"{named} As it came with the base model: {links}."]
    if terms.display is not None:
        lines += ["", f"**{terms.display}**"]
    if terms.notice is not None:
        lines += ["", f"> {terms.notice}"]
    if terms.name is not None:
        lines += ["", f"{terms.source} asks for “{terms.name}” at the beginning of the name of a model made from this one."]
    return lines
