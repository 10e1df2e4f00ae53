"""Charts as SVG: curves over steps, and bars. Small enough to be sent to a browser every few seconds, and without a library.

A chart brings no colours. Its parts have classes (`ink`, `grid`, `frame`, `a` … `d`) which the page that it stands in gives
colours, light, dark or printed. As a picture of its own (`as_image`) it has colours that can be read on white and on black.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple, TypeGuard

from stages.contracts.words import short_unit, whole_percent

Colour = Literal["a", "b", "c", "d"]
Point = tuple[float, float | None]  # None: there is no value, and the line has a gap

FONT = 12  # all lengths are in units of the picture, which are pixels where it is shown as large as it is
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 30  # around the part of a chart where its curves are
VALUE = 32  # width of a value beside its point
NICE = (0.5, 1, 2, 5, 10)  # between two ticks, times a power of ten
ROW = 20  # height of a bar with its share of the gap

STYLE = (
    f"text{{font:{FONT}px system-ui,sans-serif;fill:#747983}}"
    ".title{font-weight:600}.grid{stroke:#80808055}.frame{stroke:#80808099}.rest{fill:#80808033}.curve{fill:none;stroke-width:1.8}"
    ".curve.a,.key.a{stroke:#3b82c4}.curve.b,.key.b{stroke:#d9651e}.curve.c,.key.c{stroke:#7f6bc9}.curve.d,.key.d{stroke:#2f9a6a}"
    ".dot.a,.bar.a,text.a{fill:#3b82c4}.dot.b,.bar.b,text.b{fill:#d9651e}.dot.c,.bar.c,text.c{fill:#7f6bc9}"
    ".dot.d,.bar.d,text.d{fill:#2f9a6a}"
)


class Series(NamedTuple):
    """One curve. Few points that matter each get a dot, and the first and the last their values."""

    name: str
    points: Sequence[Point]
    colour: Colour = "a"
    is_marked: bool = False


class Bar(NamedTuple):
    """One bar of a chart, from a value to another."""

    label: str
    begin: float
    end: float
    text: str  # beside it
    colour: Colour = "a"


def curves(
    series: Sequence[Series], *, title: str, last_x: float | None = None, width: int = 640, height: int = 300
) -> str | None:
    """Curves over steps, the axis from 0 on, as SVG; None where there is not a single value.

    Args:
        last_x: where the axis ends, beyond the last point: how far there is to go.
    """
    shown = [each for each in series if any(_is_value(y) for _, y in each.points)]
    values = [y for each in shown for _, y in each.points if _is_value(y)]
    if not values:
        return None
    steps = [x for each in shown for x, _ in each.points]
    x = _Axis.of_steps(max(max(steps), last_x or 0), LEFT, width - RIGHT, count=width // 110)
    y = _Axis.of_values(min(values), max(values), height - BOTTOM, TOP, count=height // 55)
    parts = [_text(0, FONT + 2, title, "title"), *_legend(shown, width)]
    for tick, label in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {tick}H{width - RIGHT}"/>' + _text(LEFT - 6, tick + 4, label, "", "end"))
    for tick, label in x.ticks():
        parts.append(_text(tick, height - BOTTOM + 17, label, "", "middle"))
    parts.append(f'<path class="frame" d="M{LEFT} {height - BOTTOM}H{width - RIGHT}"/>')
    for each in shown:
        parts += _curve(each, x, y)
    return _svg(parts, width, height, title)


def bars(rows: Sequence[Bar], *, title: str, width: int = 640) -> str | None:
    """Horizontal bars, one below the other, as SVG; None without any."""
    if not rows:
        return None
    low, high = min(bar.begin for bar in rows), max(bar.end for bar in rows)
    labels, texts = (max(map(_room, words)) for words in ([bar.label for bar in rows], [bar.text for bar in rows]))
    scale = max(1.0, width - labels - texts) / ((high - low) or 1.0)
    parts = [_text(0, FONT + 2, title, "title")]
    for place, bar in enumerate(rows):
        top = TOP + ROW * place
        begin, end = (labels + scale * (value - low) for value in (bar.begin, bar.end))
        parts.append(_text(labels - 8, top + 12, bar.label, "", "end"))
        place_and_size = f'x="{begin:.1f}" y="{top}" width="{max(1.5, end - begin):.1f}" height="{ROW - 6}"'
        parts.append(f'<rect class="bar {bar.colour}" {place_and_size} rx="2"/>')
        parts.append(_text(round(max(begin + 1.5, end) + 6, 1), top + 12, bar.text))
    return _svg(parts, width, TOP + ROW * len(rows), title)


def progress_bar(share: float, *, width: int = 640) -> str:
    """How much of something is done, as SVG."""
    height = 10
    full = f'<rect class="bar d" width="{width * min(1.0, max(0.0, share)):.1f}" height="{height}" rx="{height // 2}"/>'
    empty = f'<rect class="rest" width="{width}" height="{height}" rx="{height // 2}"/>'
    return _svg([empty, full], width, height, whole_percent(share))


def as_image(svg: str) -> str:
    """A chart as an address that an image can have, with its own colours."""
    styled = svg.replace(">", f"><style>{STYLE}</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(styled.encode()).decode()


def _svg(parts: Iterable[str], width: int, height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    classes = f' class="{css}"' if css else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{classes}{side}>{escape(text)}</text>'


def _room(words: str) -> float:
    """What they take beside a bar, about: letters are not measured."""
    return len(words) * FONT * 0.6 + 8


def _legend(series: Sequence[Series], width: int) -> list[str]:
    """What each curve is, in the upper right corner. One alone is what the title says."""
    if len(series) < 2:
        return []
    parts = []
    x = width - RIGHT - sum(map(_legend_width, series))
    for each in series:
        parts.append(f'<path class="key {each.colour}" stroke-width="2.5" d="M{x} {FONT - 2}h16"/>')
        parts.append(_text(x + 21, FONT + 2, each.name))
        x += _legend_width(each)
    return parts


def _legend_width(series: Series) -> int:
    """About: letters are not measured."""
    return 36 + round(len(series.name) * FONT * 0.5)


def _curve(series: Series, x: "_Axis", y: "_Axis") -> list[str]:
    points = [(x.at(step), y.at(value) if _is_value(value) else None, value) for step, value in series.points]
    path, pen_is_up = "", True
    for left, top, _ in points:
        if top is None:
            pen_is_up = True
            continue
        path += f"{'M' if pen_is_up else 'L'}{left:g} {top:g}"
        pen_is_up = False
    parts = [f'<path class="curve {series.colour}" d="{path}"/>']
    placed = [(left, top, value) for left, top, value in points if top is not None and value is not None]
    if series.is_marked or len(placed) == 1:  # a line of one point is invisible
        parts += [f'<circle class="dot {series.colour}" cx="{left:g}" cy="{top:g}" r="3"/>' for left, top, _ in placed]
    if series.is_marked:
        parts.append(_value(placed[0], placed[:2][-1], "start", series.colour))
        if len(placed) > 1:
            last, has_room = placed[-1], placed[-1][0] + VALUE <= x.end  # to the right, where its line does not go
            parts.append(_value(last, last if has_room else placed[-2], "start" if has_room else "end", series.colour))
    return parts


def _value(point: tuple[float, float, float], beside: tuple[float, float, float], anchor: str, colour: Colour) -> str:
    """The value of a point: above it, or below where the line to the point beside would go through the words."""
    (left, top, value), (other, height, _) = point, beside
    is_steep = (top - height) * VALUE > 6 * abs(left - other)
    return _text(left, top + 18 if is_steep else max(top - 8, TOP + 6), f"{value:.2f}", colour, anchor)


def _is_value(y: float | None) -> TypeGuard[float]:
    return y is not None and math.isfinite(y)


class _Axis(NamedTuple):
    """From values to places in the picture."""

    low: float
    high: float
    begin: float  # where `low` is
    end: float
    step: float  # between ticks

    @classmethod
    def of_steps(cls, last: float, begin: float, end: float, *, count: int) -> "_Axis":
        """From 0 to a step, with about so many ticks at whole steps."""
        last = last or 1.0
        return cls(0.0, last, begin, end, max(1.0, _between_ticks(0.0, last, count)))

    @classmethod
    def of_values(cls, low: float, high: float, begin: float, end: float, *, count: int) -> "_Axis":
        """An axis on which all values find room, with about so many ticks at round numbers."""
        if high - low <= 1e-5 * abs(high):  # a difference that is nothing but rounding is not made large
            low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
        else:
            margin = 0.05 * (high - low)
            low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
        return cls(low, high, begin, end, _between_ticks(low, high, count))

    def at(self, value: float) -> float:
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        values = [n * self.step for n in _multiples(self.low, self.high, self.step)]
        return list(zip(map(self.at, values), _labels(values, self.step), strict=True))


def _multiples(low: float, high: float, step: float) -> range:
    """The multiples of a step in a range, which may begin or end with one."""
    return range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)


def _between_ticks(low: float, high: float, count: int) -> float:
    """A round step for about so many ticks, and for two at least: one alone is no scale."""
    rough = (high - low) / max(count, 2)
    steps = [10.0 ** math.floor(math.log10(rough)) * nice for nice in NICE]
    coarse = next(step for step in steps if step >= rough * 0.999)
    return max(step for step in steps if step <= coarse and len(_multiples(low, high, step)) > 1)


def _labels(values: Sequence[float], step: float) -> list[str]:
    """The values at ticks, all in one form and unit, with as many digits as tell each from those beside it."""
    largest = max(map(abs, values))
    unit, name = short_unit(largest) if largest >= 10_000 else (1.0, "")
    exponent = math.floor(math.log10(step / unit) + 1e-9)
    if exponent >= -3 or largest >= 0.999e-3:
        return [f"{value / unit:.{max(0, -exponent)}f}{name}" if value or not name else "0" for value in values]
    digits = next(k for k in range(17) if all(abs(float(f"{value:.{k}e}") - value) < step / 100 for value in values))
    return [f"{value:.{digits}e}".replace("e-0", "e-") if value else "0" for value in values]
