"""Markdown in which what others may have written is harmless: names of files, settings, messages, text of models."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from flows.show.charts import as_image
from stages.contracts import words

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")
LINK = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)", re.IGNORECASE)  # inside what the UI would make a link of
LONGEST_CODE = 200  # characters


def text(value: Any) -> str:
    """Words as they are: nothing in them is markup, and no address becomes a link."""
    return LINK.sub("\N{WORD JOINER}", SPECIAL.sub(r"\\\1", words.plain(str(value))))


def code(value: Any) -> str:
    """A name, a path, a digest: what is typed or compared."""
    shown = words.plain(str(value)).replace("`", "'").replace("|", "¦").strip()
    shown = shown if len(shown) <= LONGEST_CODE else shown[:LONGEST_CODE] + "…"
    return f"`{shown}`" if shown else ""


def digest(value: str) -> str:
    """The beginning of one: enough to compare by eye. The whole stands in artifact.json."""
    return code(value[:16])


def block(text: str) -> str:
    """Several lines, as they are."""
    shown = words.lines(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, without a head; the values are Markdown already."""
    return table(("", ""), [(text(name), value) for name, value in rows if value])


def picture(svg: str | None, alt: str) -> str:
    """A chart; nothing where there is none. `alt` for who does not see it."""
    return f"![{text(alt)}]({as_image(svg)})" if svg is not None else ""


def page(*blocks: str) -> str:
    """Blocks one after the other, empty ones left out."""
    return "\n\n".join(filter(None, blocks)) + "\n"
