"""Charts: what is drawn lies in the picture, gaps are gaps, words are words."""

import base64
import re
from xml.etree import ElementTree

import pytest

from flows.show.charts import LEFT, RIGHT, TOP, Bar, Series, as_image, bars, curves, progress_bar

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str | None) -> ElementTree.Element:
    assert svg is not None
    return ElementTree.fromstring(svg)


def words(svg: str | None) -> list[str]:
    return [text.text or "" for text in drawn(svg).iter(f"{SVG}text")]


def path_of(svg: str | None, colour: str) -> str:
    [path] = [p for p in drawn(svg).iter(f"{SVG}path") if p.get("class") == f"curve {colour}"]
    return path.get("d") or ""


def test_a_curve_lies_in_its_frame_and_ends_where_the_axis_does() -> None:
    svg = curves([Series("loss", [(10, 8.0), (20, 3.0), (40, 4.0)])], title="loss", width=400, height=200)
    points = [tuple(map(float, point)) for point in re.findall(r"[ML]([\d.]+) ([\d.]+)", path_of(svg, "a"))]
    wide = 400 - LEFT - RIGHT
    assert [x for x, _ in points] == [LEFT + wide / 4, LEFT + wide / 2, LEFT + wide], "it begins at 0, as all beside it"
    assert all(TOP < y < 200 for _, y in points)
    assert points[0][1] < points[2][1] < points[1][1]  # 8 above 4 above 3
    further = curves([Series("loss", [(10, 8.0), (20, 3.0)])], title="loss", last_x=100, width=400, height=200)
    assert float(re.findall(r"L([\d.]+) ", path_of(further, "a"))[-1]) < 120, "the axis goes on to where training ends"


def test_what_is_not_finite_is_a_gap() -> None:
    values = [(1, 2.0), (2, None), (3, 2.5), (4, float("nan")), (5, 1.0), (6, 1.5)]
    path = path_of(curves([Series("loss", values)], title="loss"), "a")
    assert (path.count("M"), path.count("L")) == (3, 1)
    assert curves([Series("loss", [(1, None)])], title="loss") is None
    assert curves([], title="loss") is None


def test_marks_and_a_legend_only_where_they_say_something() -> None:
    two = curves(
        [Series("training", [(1, 2.0), (2, 1.0)]), Series("held-out", [(0, 3.25), (2, 1.5)], "b", is_marked=True)], title="t"
    )
    assert {"training", "held-out", "3.25", "1.50"} <= set(words(two))
    one = curves([Series("training", [(1, 2.0)])], title="t")
    assert "training" not in words(one)
    assert len(list(drawn(one).iter(f"{SVG}circle"))) == 1, "a line of one point is invisible"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 4e-3], {"0.000", "0.002", "0.004"}),
        ([0.0, 2.2e-5], {"0", "1e-5", "2e-5"}),
        ([20_000.0, 24_000.0], {"20K", "22K", "24K"}),
        ([5.0, 5.0], {"4", "6"}),
        ([0.0, 0.0], {"0.0"}),
        ([-1.0, 1.0], {"-1", "0", "1"}),
        ([24_100.0, 24_140.0], {"24.10K", "24.12K", "24.14K"}),
        ([950_000.0, 1_050_000.0], {"0.95M", "1.00M", "1.05M"}),
        ([0.0, 15_000.0], {"0", "5K", "10K", "15K"}),
        ([5e-5, 1.04e-4], {"6e-5", "8e-5", "1e-4"}),
        ([0.0, 1e-4], {"0", "5e-5", "1e-4"}),
        ([0.0, 1.8e-5], {"0", "5.0e-6", "1.0e-5", "1.5e-5"}),
        ([0.0, 1.2e-3], {"0.0000", "0.0005", "0.0010"}),
        ([2.3451, 2.3459], {"2.3452", "2.3454", "2.3456", "2.3458"}),
        ([2.3, 2.3 + 1e-7], {"2", "3"}),
    ],
)
def test_ticks_are_round_numbers(values: list[float], labels: set[str]) -> None:
    svg = curves([Series("", list(enumerate(values)))], title="t", width=400, height=230)
    assert labels <= set(words(svg)), words(svg)


@pytest.mark.parametrize("span", [1e-4, 3e-4, 8e-4, 2e-3, 0.03, 0.2, 0.44, 1.0])
@pytest.mark.parametrize("low", [1e-5, 3e-4, 2.3451, 99.7, 9_990.0, 24_100.0, 999_000.0])
def test_no_two_ticks_have_one_label_and_none_is_alone(low: float, span: float) -> None:
    steps = [(0, low), (3, low * (1 + span))]
    svg = curves([Series("", steps)], title="t", width=400, height=230)
    left = [text.text or "" for text in drawn(svg).iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert len(set(left)) == len(left) > 1, left


@pytest.mark.parametrize(
    ("steps", "labels"), [([0], ["0", "1"]), ([1, 2, 3], ["0", "1", "2", "3"]), ([10], ["0", "2", "4", "6", "8", "10"])]
)
def test_steps_are_whole_and_begin_at_0(steps: list[int], labels: list[str]) -> None:
    svg = curves([Series("", [(step, 2.0) for step in steps])], title="t", width=640)
    assert [text.text for text in drawn(svg).iter(f"{SVG}text") if text.get("text-anchor") == "middle"] == labels


def test_a_value_stands_beside_its_line_not_on_it() -> None:
    """Where the curve goes on: to the right of its last point. At the end: above, or below where the line falls steeply."""

    def places(*values: float, last_x: int | None = None) -> list[tuple[str, bool]]:
        svg = curves([Series("held-out", list(enumerate(values)), "b", is_marked=True)], title="t", last_x=last_x)
        dots = {circle.get("cx"): float(circle.get("cy") or 0) for circle in drawn(svg).iter(f"{SVG}circle")}
        marks = [text for text in drawn(svg).iter(f"{SVG}text") if text.get("class") == "b"]
        return [(text.text or "", float(text.get("y") or 0) > dots[text.get("x")]) for text in marks]

    assert places(8.37, 5.23) == [("8.37", False), ("5.23", True)]
    assert places(5.23, 8.37) == [("5.23", True), ("8.37", False)]
    assert places(8.37, 5.01, 5.0, 4.99) == [("8.37", False), ("4.99", False)], "nearly flat"
    under_way = curves([Series("", [(0, 8.37), (1, 5.23)], "b", is_marked=True)], title="t", last_x=2)
    [last] = [text for text in drawn(under_way).iter(f"{SVG}text") if text.text == "5.23"]
    assert last.get("text-anchor") is None, "it stands to the right"
    assert places(8.37, 5.23, last_x=2)[1] == ("5.23", False)
    assert places(8.37, 5.0, 6.0) == [("8.37", False), ("6.00", False)]
    assert places(8.37) == [("8.37", False)]


def test_bars_keep_their_words_in_the_picture() -> None:
    longest = "1,048,576 to 2,097,151"
    svg = bars([Bar("train", 10, 190, "3m 00s"), Bar(longest, 190, 190, "0.0s")], title="when", width=400)
    [end] = [float(text.get("x") or 0) for text in drawn(svg).iter(f"{SVG}text") if text.text == longest]
    assert end >= 7 * len(longest), "it ends there"
    for rect in drawn(svg).iter(f"{SVG}rect"):
        assert float(rect.get("x") or 0) + float(rect.get("width") or 0) <= 400 - 6 * 6
        assert float(rect.get("width") or 0) >= 1.5
    assert {"train", "3m 00s", longest} <= set(words(svg))
    assert bars([], title="when") is None


def test_words_of_others_are_no_markup_and_an_image_is_whole() -> None:
    hostile = "<script>&\"'"
    svg = bars([Bar(hostile, 0, 1, hostile)], title=hostile)
    assert words(svg).count(hostile) == 3
    kind, _, data = as_image(svg or "").partition(";base64,")
    assert kind == "data:image/svg+xml"
    style, *_ = drawn(base64.b64decode(data).decode())
    assert style.tag == f"{SVG}style"
    assert "curve.a" in (style.text or "")
    widths = [float(rect.get("width") or 0) for rect in drawn(progress_bar(1.7, width=100)).iter(f"{SVG}rect")]
    assert widths == [100, 100]
