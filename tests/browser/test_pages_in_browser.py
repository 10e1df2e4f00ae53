"""Prefect's UI in a browser, against a runner and its server: a run that fails, what one reads of it, the retry, the end; and
the form in which a run is started.

Prefect has two UIs. The addresses that we print open the older one, `/` the newer.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from browsing import OpenPage
from playwright.sync_api import Page, expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.sorting import ArtifactSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from processes import wait_until
from runners import Seen, Serving
from stories import metrics_lines, write_metrics

from flows.launch.protocol import Progress
from flows.records.run_record import now
from flows.show.pages.board import Board
from flows.show.pages.markdown import text
from flows.show.pages.training import training_page
from stages.contracts.training_curves import curves_in

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

STAGES = ["download-model", "download-data", "preprocess", "convert", "shard", "verify", "train", "merge", "export", "push"]
RUN = "calm-heron"
TALL = {"width": 1280, "height": 1800}  # of a list the older UI has only what is on the screen


class World:
    """A runner with its own server, one run of it, and its address."""

    def __init__(self, runner: Serving, seen: Seen, server: str, run: UUID) -> None:
        self.runner, self.seen, self.server, self.run = runner, seen, server, run

    def complete(self) -> None:
        """Have the run come to its end, where the test that does so in the browser has not been."""
        if self.seen.state(self.run) != "Completed":
            self.runner.wish("train", "")
            self.seen.client.set_flow_run_state(self.run, Scheduled(name="AwaitingRetry"), force=True)
            self.seen.wait_for(self.run, "Completed")

    def page(self, at: str) -> str:
        """Of the run, in one of the UIs."""
        return f"{self.server}{at}/runs/flow-run/{self.run}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    runner = Serving(tmp_path_factory.mktemp("ui"), None, "served", command="ui")
    try:
        runner.make(until="verify")
        runner.wait_until_said("stop         Ctrl-C", 300)
        [server] = re.findall(r"Prefect UI   (\S+)", runner.said())
        with temporary_settings({PREFECT_API_URL: f"{server}/api"}), get_client(sync_client=True) as client:
            seen = Seen(client)
            runner.wish("train", "fail")
            run = seen.start("finetune-llama2/served", run_name=RUN)
            seen.wait_for(run.id, "Failed")
            yield World(runner, seen, server, run.id)
    finally:
        runner.end()
        print(runner.said())  # pytest shows it where something failed


def open_tab(page: Page, name: str) -> None:
    """Of a run's page."""
    (page.get_by_role("tab", name=name) if "/v2/" in page.url else page.locator("li.p-tab", has_text=name)).click()


def open_artifact(page: Page, key: str) -> None:
    """From a run's page by its tab to the newest one; the newer UI has a list of all versions in between."""
    open_tab(page, "Artifacts")
    if "/v2/" in page.url:
        page.locator(f"a[href$='/artifacts/key/{key}']").first.click()  # one for each attempt
        page.locator("a[href*='/artifacts/artifact/']").first.click()
    else:
        page.get_by_role("link", name=re.compile(f"^markdown {key} ")).click()


def retry(page: Page) -> None:
    """As a person does, on a run's page."""
    if "/v2/" in page.url:
        page.get_by_role("button", name="Open menu").click()
        page.get_by_role("menuitem", name="Retry").click()
    else:
        page.get_by_role("button", name="Retry").click()
    page.get_by_role("alertdialog").or_(page.get_by_role("dialog")).get_by_role("button", name="Retry").click()


def test_a_run_that_failed_says_why_and_is_retried(world: World, open_page: OpenPage) -> None:
    """In the older UI, where it fails again, then in the newer one."""
    for at, attempt in (("", 1), ("/v2", 2)):
        page = open_page(world.page(at), viewport=TALL)
        expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
        expect(page.get_by_text(RUN).first).to_be_visible()
        open_tab(page, "Task Runs")
        for stage in STAGES[: STAGES.index("merge")]:
            expect(page.get_by_role("link", name=stage, exact=True)).to_have_count(attempt)
        for stage in STAGES[STAGES.index("merge") :]:
            expect(page.get_by_text(re.compile(f"^{stage}"))).to_have_count(0)  # what is not reached is not there

        open_artifact(page, "train")
        expect(page.get_by_role("heading", name=re.compile("^train failed after"))).to_be_visible()
        expect(page.get_by_text("RuntimeError: a defect").first).to_be_visible()
        expect(page.get_by_role("cell", name="exit code").locator("xpath=following-sibling::td")).to_have_text("1")

        page.goto(world.page(at))
        world.runner.wish("train", "fail" if attempt == 1 else "")
        retry(page)
        wait_until(lambda attempt=attempt: world.runner.record(RUN).attempt == attempt + 1)  # type: ignore[misc]
        ends = "Failed" if attempt == 1 else "Completed"
        world.seen.wait_for(world.run, ends)
        expect(page.get_by_text(ends, exact=True).first).to_be_visible()
    record = world.runner.record(RUN)
    assert record.attempt == 3
    assert [record.nodes[stage].state for stage in STAGES] == ["cached"] * 6 + ["ran"] * 4


def test_the_form_of_a_deployment(world: World, open_page: OpenPage) -> None:
    """It has descriptions, choices, and what the deployment's file says; sent off as it is, it means that."""
    world.complete()
    deployment = world.seen.client.read_deployment_by_name("finetune-llama2/served")
    page = open_page(f"{world.server}/v2/deployments/deployment/{deployment.id}/run")
    expect(page.get_by_text("length in optimizer updates; or give epochs, or tokens")).to_be_visible()
    expect(page.get_by_role("textbox", name="Source")).to_have_value("somebody/model")
    expect(page.get_by_role("spinbutton", name="Sequence Length").last).to_have_value("16")  # train's; before it is verify's
    by = page.get_by_role("button", name="Select By")
    expect(by).to_have_text("process")
    by.click()
    expect(page.get_by_role("option")).to_have_text(["auto", "process", "docker"])
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"tab=Runs$"))
    asked = FlowRunFilter(id=FlowRunFilterId(not_any_=[world.run]))
    wait_until(lambda: len(world.seen.client.read_flow_runs(flow_run_filter=asked)) == 1)
    [run] = world.seen.client.read_flow_runs(flow_run_filter=asked)
    world.seen.wait_for(run.id, "Completed")
    assert run.parameters["config"] == deployment.parameters["config"]


@pytest.mark.parametrize("at", ["", "/v2"], ids=["the older UI", "the newer UI"])
def test_the_summary_leads_to_the_report(world: World, open_page: OpenPage, at: str) -> None:
    world.complete()
    page = open_page(f"{world.server}{at}/artifacts/artifact/{artifact_id(world, 'summary')}")
    expect(page.get_by_role("heading", name=re.compile(f"^{RUN}: done, "))).to_be_visible()
    expect(page.get_by_text("self, size=-1):").first).to_be_visible()
    page = follow(page, "open it")
    expect(page.get_by_role("heading", name=re.compile(f"^{RUN} done"))).to_be_visible()
    assert page.url == f"{world.server}/reports/{world.run}.html"
    expect(page.get_by_role("heading", name="Configuration")).to_be_visible()


@pytest.mark.parametrize("at", ["", "/v2"], ids=["the older UI", "the newer UI"])
def test_pictures_and_tables_are_shown(world: World, open_page: OpenPage, at: str, tmp_path: Path) -> None:
    write_metrics(tmp_path, metrics_lines())
    board = Board(str(world.run))
    board.put("picture", "markdown", training_page(Progress(40, 280, ""), curves_in(tmp_path), moment=now()), "a training")
    board.end()
    page = open_page(f"{world.server}{at}/artifacts/artifact/{artifact_id(world, 'picture')}")
    expect(page.get_by_role("heading", name="train, 14%")).to_be_visible()
    expect(page.get_by_role("cell", name="24,100 tokens/s")).to_be_visible()
    chart = page.get_by_role("img", name="the loss by step, so far")
    expect(chart).to_be_visible()
    assert chart.evaluate("image => image.decode().then(() => image.naturalWidth)") == 640


@pytest.mark.parametrize("at", ["", "/v2"], ids=["the older UI", "the newer UI"])
def test_an_address_in_words_of_others_is_no_link(world: World, open_page: OpenPage, at: str) -> None:
    board = Board(str(world.run))
    board.put("words", "markdown", f"## words\n\n{text('at https://a.example, www.b.example, me@c.example')}", "")
    board.end()
    page = open_page(f"{world.server}{at}/artifacts/artifact/{artifact_id(world, 'words')}")
    expect(page.get_by_text(re.compile(r"at https:.?//a\.example")).first).to_be_visible()
    expect(page.get_by_role("link", name=re.compile(r"\.example"))).to_have_count(0)


def follow(page: Page, name: str) -> Page:
    """Click a link; the page it leads to, which the older UI opens beside its own."""
    link = page.get_by_role("link", name=name)
    if link.get_attribute("target") != "_blank":
        link.click()
        return page
    with page.context.expect_page() as opened:
        link.click()
    return opened.value


def artifact_id(world: World, key: str) -> UUID:
    """The newest one of the run under a key."""
    asked = ArtifactFilter(key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[world.run]))
    found = world.seen.client.read_artifacts(artifact_filter=asked, sort=ArtifactSort.CREATED_DESC)
    return found[0].id
