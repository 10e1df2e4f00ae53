"""A browser, and pages in it that reach nothing but this machine."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from browsing import OpenPage
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "flows"))  # the stand-ins

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECONDS = 90.0  # for what a page has to load and show on a busy machine


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium: the machine's own, else the one that `playwright install chromium` has fetched."""
    own = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=own, args=FLAGS)
        except Error as error:
            pytest.fail(f"no Chromium to test with: apt-get install chromium, or playwright install chromium ({error})")
        expect.set_options(timeout=1000 * SECONDS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page of a size in a colour scheme. What it asks of other machines is refused."""
    contexts = []

    def open_one(address: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(1000 * SECONDS)
        context.route("**/*", _only_here)
        page = context.new_page()
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()


def _only_here(route: Route) -> None:
    """Let requests to this machine through. Servers are asked for Chromium, which gives up what it is loading whenever a
    network interface comes or goes, as it does with every container that starts or stops.
    """
    address = route.request.url
    if address.startswith("http://127.0.0.1:"):
        with suppress(Error):  # the page has gone
            route.fulfill(response=route.fetch(timeout=1000 * SECONDS))
    elif address.startswith(("file:", "data:", "blob:")):
        route.continue_()
    else:
        route.abort()
