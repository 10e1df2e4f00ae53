"""The report as people look at it: on a phone, on a desk, on paper, in the dark."""

import json

import pytest
from browsing import OpenPage
from playwright.sync_api import Page, expect
from stories import GATES, HOSTILE, done_run, told, with_artifact, with_file

from flows.show.report.write import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with everything in it, much of it written by somebody who means harm."""
    folder = done_run(tmp_path_factory.mktemp("report"))
    story = with_file(told(folder), "verify", "verification.json", json.dumps(GATES))
    sample = {"prompt": HOSTILE, "before": "x" * 3000, "after": f"<img src=x onerror=alert(1)>{HOSTILE}"}
    story = with_artifact(story, "export", metrics={"samples": [sample]})
    story = with_file(story, "train", "long-name-" * 12 + ".safetensors", "")
    return write_report(story).as_uri()


def width_of(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_it_fits(report: str, open_page: OpenPage, width: int) -> None:
    page = open_page(report, viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert width_of(page) == width, "nothing is to the right of the screen"
    smallest = page.evaluate("""
        Math.min(...[...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height))
    """)
    assert smallest >= 8.5, "words in charts are still read"
    overlapping = page.evaluate("""
        [...document.querySelectorAll("figure svg")].filter(svg => [...svg.querySelectorAll("text")].some(text => {
            const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
            return inner.left < outer.left - 1 || inner.right > outer.right + 1;
        })).length
    """)
    assert overlapping == 0, "no word is cut off by its picture"


@pytest.mark.parametrize("width", [320, 390])
def test_tables_are_read_on_a_phone(report: str, open_page: OpenPage, width: int) -> None:
    page = open_page(report, viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.locator(".scroll").count() > 3
    cut = page.evaluate("[...document.querySelectorAll('.scroll')].filter(it => it.scrollWidth > it.clientWidth).length")
    assert cut == 0, "nothing of a row is cut off"
    narrowest = page.evaluate("Math.min(...[...document.querySelectorAll('tbody th')].map(it => it.clientWidth))")
    assert narrowest >= 120, "names are not one letter a line"
    assert broken_values(page) == []
    misplaced = page.evaluate("""
        [...document.querySelectorAll(".numbers")].filter(table => {
            const places = row => [...row.children].slice(1).map(it => Math.round(it.getBoundingClientRect().right));
            return new Set([...table.rows].map(row => places(row).join())).size > 1;
        }).length
    """)
    assert misplaced == 0, "values stand below what they are"


def test_tables_are_read_on_paper(report: str, open_page: OpenPage) -> None:
    page = open_page(report, viewport={"width": 680, "height": 900})
    page.emulate_media(media="print")
    assert broken_values(page) == []
    page.evaluate("scrollTo(0, document.body.scrollHeight)")  # on a screen, heads of long tables go along
    below = page.evaluate("""
        [...document.querySelectorAll("table")].filter(table => {
            const place = of => table.querySelector(of).getBoundingClientRect();
            return place("thead tr > :last-child").bottom > place("tbody tr").top + 1;
        }).length
    """)
    assert below == 0, "what columns are stands above them"


def broken_values(page: Page) -> list[str]:
    """The numbers and digests in tables that have several lines."""
    assert page.locator(".numbers td").count() > 10
    found = page.evaluate("""
        [...document.querySelectorAll(".numbers td")].filter(cell => {
            const text = document.createRange();
            text.selectNodeContents(cell);
            return /^[^ ]+( %)?$/.test(cell.textContent) && text.getClientRects().length > 1;
        }).map(cell => cell.textContent)
    """)
    return list(found)


def test_it_runs_nothing_and_asks_nobody(report: str, open_page: OpenPage) -> None:
    page = open_page("about:blank")
    asked: list[str] = []
    dialogs: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(report)
    page.wait_for_load_state("networkidle")
    assert asked == [report]
    assert dialogs == []
    assert page.locator("script, img").count() == 0


def test_dark_light_and_paper(report: str, open_page: OpenPage) -> None:
    def colours(page: Page) -> tuple[str, str]:
        style = "getComputedStyle(document.body)"
        return page.evaluate(f"{style}.backgroundColor"), page.evaluate(f"{style}.color")

    dark = open_page(report, color_scheme="dark")
    light = open_page(report, color_scheme="light")
    assert colours(dark) == ("rgb(19, 21, 25)", "rgb(230, 232, 236)")
    assert colours(light) == ("rgb(255, 255, 255)", "rgb(28, 30, 34)")
    dark.emulate_media(media="print")
    assert colours(dark) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    dark.set_viewport_size({"width": 680, "height": 900})
    assert width_of(dark) == 680
    assert dark.get_by_text("global_batch_size").is_visible(), "paper cannot be unfolded"


def test_a_node_of_the_graph_leads_to_its_result(report: str, open_page: OpenPage) -> None:
    page = open_page(report)
    files = page.locator("#train").get_by_role("rowheader", name="content.txt")
    expect(files).to_be_hidden()
    page.locator("svg a[href='#train']").click()
    assert page.url.endswith("#train")
    expect(files).to_be_visible()
    expect(page.locator("#train")).to_be_in_viewport()
