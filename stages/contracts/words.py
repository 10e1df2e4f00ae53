"""Figures as people read them: times, sizes, counts; and words of others, made safe."""

import math
import os
from datetime import datetime
from pathlib import Path

from megatron_core_impl.metrics import duration

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
LONGEST_BRIEF = 100  # characters of an error in a line of a list; the whole of it is told elsewhere


def seconds(value: float) -> str:
    """A duration: 0.4s, 12s, 3m 12s, 2h 05m."""
    return f"{value:.1f}s" if value < 9.95 else duration(value)


def ago(moment: datetime, now: datetime) -> str:
    """How long since: 5s ago, 14m ago, 2h ago, 3d ago."""
    passed = max(0, round((now - moment).total_seconds()))
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if passed >= unit:
            return f"{passed // unit}{name} ago"
    return f"{passed}s ago"


def size(value: float) -> str:
    """Bytes: 512 B, 12.4 MB, 1.4 GB."""
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 (used after the loop)
        value /= 1000
        if value < 999.5:
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def count(value: int) -> str:
    """A count with separators: 2,214."""
    return f"{value:,}"


def counted(value: int, noun: str) -> str:
    """1 document, 2,214 documents."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def short(value: float) -> str:
    """A large count, rounded: 950, 512 K, 6.74 B."""
    unit, name = short_unit(value)
    return f"{value / unit:.3g} {name}" if name else f"{value:.0f}"


def short_unit(value: float) -> tuple[float, str]:
    """The unit that a large count is told in. What three digits round up to the next unit is told in that: 999,600 is 1 M."""
    return next(((unit, name) for unit, name in UNITS if value >= 0.9995 * unit), (1.0, ""))


def whole_percent(share: float) -> str:
    """A share in whole percent. 100% is all of it, and nothing less."""
    return f"{math.floor(100 * share + 1e-9)}%"


def plain(text: str) -> str:
    """Text of others, made safe for a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def lines(text: str) -> str:
    """The same of text that may have several lines, and indents them."""
    return "\n".join(plain(line.expandtabs(4)) for line in text.split("\n"))


def brief(error: str) -> str:
    """The beginning of an error's first line."""
    first = error.partition("\n")[0]
    return plain(first if len(first) <= LONGEST_BRIEF else first[:LONGEST_BRIEF].rstrip() + " …")


def shown_path(path: Path) -> str:
    """A path as a person here would type it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
