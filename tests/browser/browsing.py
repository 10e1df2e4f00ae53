"""What tests in a browser share: the type of what opens a page."""

from collections.abc import Callable

from playwright.sync_api import Page

OpenPage = Callable[..., Page]  # of an address, with options of a browser context: viewport, color_scheme
