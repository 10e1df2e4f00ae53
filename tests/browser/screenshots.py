"""Take the pictures of docs/ui.md anew, of a run on a server that is kept: `finetune run configs/demo.yaml --keep-server`.

python tests/browser/screenshots.py WORKSPACE RUN                 all but that of a training under way, to docs/images/
python tests/browser/screenshots.py WORKSPACE RUN --live          those of a training under way
python tests/browser/screenshots.py WORKSPACE RUN --failed        those of a run of a deployment that verify refused
python tests/browser/screenshots.py WORKSPACE RUN --only run      one of them
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

from flows.records.run_record import RunFolder

ROOT = Path(__file__).parents[2]
TIMEOUT = 120_000  # ms
LAUNCH = "text=LaunchSettings"  # of the form


class Camera:
    """Takes pictures of the pages of a run."""

    def __init__(self, browser: Browser, workspace: Path, name: str, target: Path) -> None:
        folder = RunFolder(workspace, name)
        record = folder.read()
        assert record is not None
        assert record.page is not None
        self.browser, self.target, self.report = browser, target, folder.report
        self.page_of_run, self.server = record.page, record.page.partition("/runs/")[0]
        asked = {"artifacts": {"flow_run_id": {"any_": [record.flow_run_id]}}, "limit": 200}
        with httpx.Client(trust_env=False) as client:
            found = client.post(f"{self.server}/api/artifacts/filter", json=asked).json()
            run = client.get(f"{self.server}/api/flow_runs/{record.flow_run_id}").json()
        self.form = f"{self.server}/v2/deployments/deployment/{run['deployment_id']}/run"
        self.pages = {each["key"]: f"{self.server}/v2/artifacts/artifact/{each['id']}" for each in found}

    def take(
        self, name: str, address: str, *,
        wait_for: str, width: int = 1280, height: int = 800, dark: bool = False, to: str | None = None,
    ) -> None:  # fmt: skip
        """One picture, of what is seen when an element is there; `to`: an element to scroll to."""
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        context.set_default_timeout(TIMEOUT)
        context.route(lambda url: not url.startswith((self.server, "file:", "data:", "blob:")), lambda route: route.abort())
        page = context.new_page()
        page.goto(address)
        page.locator(wait_for).first.wait_for()
        page.wait_for_timeout(2000)  # what is drawn on a canvas tells nobody that it is done
        if to is not None:
            page.locator(to).first.evaluate("element => element.scrollIntoView()")
        page.screenshot(path=self.target / f"{name}.png")
        context.close()
        print(self.target / f"{name}.png", (self.target / f"{name}.png").stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("run")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    markdown = "[data-testid=markdown-display] h2"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        camera = Camera(browser, arguments.workspace.resolve(), arguments.run, arguments.output)
        report = camera.report.resolve().as_uri()
        live = {"train-live": lambda name: camera.take(name, camera.pages["train"], wait_for=markdown, height=980)}
        done = {
            "run": lambda name: camera.take(name, camera.page_of_run, wait_for="text=Task Runs"),
            "preprocess": lambda name: camera.take(name, camera.pages["preprocess"], wait_for=markdown, height=900),
            "verify": lambda name: camera.take(name, camera.pages["verify"], wait_for=markdown, height=900),
            "summary": lambda name: camera.take(name, camera.pages["summary"], wait_for=markdown, height=1000),
            "report": lambda name: camera.take(name, report, wait_for="h1", width=1000, height=1250),
            "report-phone": lambda name: camera.take(name, report, wait_for="h1", width=360, height=1100, dark=True),
        }
        failed = {
            "form": lambda name: camera.take(name, camera.form, wait_for=LAUNCH, to=LAUNCH, height=900),
            "failed": lambda name: camera.take(name, camera.pages["verify"], wait_for=markdown, height=900),
        }
        pictures: dict[str, Callable[[str], None]] = live if arguments.live else failed if arguments.failed else done
        for name, take in pictures.items():
            if arguments.only in (None, name):
                take(name)
        browser.close()


if __name__ == "__main__":
    main()
