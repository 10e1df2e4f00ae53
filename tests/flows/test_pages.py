"""Pages in Prefect's UI: what a stage did, how far it is, why it failed; and that nobody waits for them."""

import base64
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from fake_stages import config, make_results
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_API_URL, temporary_settings
from processes import wait_until
from stories import HOSTILE, done_run, metrics_lines, told, with_artifact, write_metrics

from flows.launch.protocol import Progress, StageFailed
from flows.records.run_record import NodeRecord, now
from flows.server.local import Server
from flows.show.pages import live
from flows.show.pages.board import Board
from flows.show.pages.failed import failed_page
from flows.show.pages.live import Live, shown_on
from flows.show.pages.markdown import block, code, table, text
from flows.show.pages.stage import stage_page
from flows.show.pages.summary import summary_page
from flows.show.pages.training import training_page
from stages.contracts import artifacts as a
from stages.contracts.specs import TrainSpec
from stages.contracts.training_curves import read_curves


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, a.Artifact]]:
    workspace = tmp_path_factory.mktemp("pages")
    results = make_results(config(workspace))
    write_metrics(results["train"].folder(workspace), metrics_lines())
    return workspace, results


def pictures(page: str) -> list[str]:
    """The SVG of the images in a page."""
    found = re.findall(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([\w+/=]+)\)", page)
    return [base64.b64decode(each).decode() for each in found]


def test_words_of_others_are_no_markup() -> None:
    assert text("a_b <i> [x](y) `c` | d") == r"a\_b \<i\> \[x\](y) \`c\` \| d"
    assert code("a`b|c\nd") == "`a'b¦c d`"
    assert code("x" * 300) == f"`{'x' * 200}…`"
    assert block("```\nrm\x1b[31m") == "````text\n```\nrm [31m\n````"
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_stage_s_page(made: tuple[Path, dict[str, a.Artifact]]) -> None:
    workspace, results = made
    for node, artifact in results.items():
        page = stage_page(node, artifact, workspace, cached=False)
        assert page.startswith(f"## {node}\n\nRan in ")
        assert "exit code 0" in page
        assert f"| fingerprint | `{artifact.fingerprint[:16]}` |" in page
        record = artifact.files["content.txt"]
        assert f"| `content.txt` | {record.size} B | `{record.blake3[:16]}` |" in page
    page = stage_page("verify", results["verify"], workspace, cached=True)
    shards = results["shard"]
    assert f"| weights | shard | `{shards.path}` | `{shards.fingerprint[:16]}` |" in page
    assert "Cached: this result was there" in page
    assert "| data | " not in page
    hostile = results["download-model"].model_copy(update={"source": HOSTILE})
    page = stage_page("download-model", hostile, workspace, cached=False)
    assert "| source | `<script>alert(1)</script>¦'*_&\"' [31m` |" in page


def test_the_page_of_data(made: tuple[Path, dict[str, a.Artifact]], tmp_path: Path) -> None:
    dataset = made[1]["preprocess"]
    assert isinstance(dataset, a.DatasetArtifact)
    one = dataset.sets[0].model_copy(
        update={"lengths": {"32": 663, "64": 1096, "1024": 3}, "malformed_lines": 2, "left_out": {"too long": 4}}
    )
    here = dataset.model_copy(update={"path": "preprocess/x", "sets": (one,)})
    (tmp_path / "preprocess" / "x").mkdir(parents=True)
    lines = [{"source": "d", "file": f"{HOSTILE}.jsonl", "line": 7, "reason": "not JSON"}] * 9
    (tmp_path / "preprocess" / "x" / "malformed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = stage_page("preprocess", here, tmp_path, cached=False)
    assert "| `data` | all | 64 | 4,096 | 64.0 | 64 | 2 malformed, 4 too long |" in page
    [histogram] = pictures(page)
    assert "64 – 127" in histogram
    assert "1,096" in histogram
    assert page.count("| `7` | `not JSON` |") == 5


def test_the_page_of_a_gate_has_its_table(made: tuple[Path, dict[str, a.Artifact]], tmp_path: Path) -> None:
    verification = made[1]["verify"].model_copy(update={"path": "verify/x"})
    (tmp_path / "verify" / "x").mkdir(parents=True)
    (tmp_path / "verify" / "x" / "verification.md").write_text("# title\n\n## Logits\n\n| output of | relative 1e-07 |\n")
    page = stage_page("verify", verification, tmp_path, cached=False)
    assert "\n### Logits\n\n| output of | relative 1e\u201107 |\n" in page
    assert "# title" not in page


def test_the_page_of_training_while_it_runs_and_after(made: tuple[Path, dict[str, a.Artifact]]) -> None:
    workspace, results = made
    curves = read_curves(results["train"].folder(workspace))
    page = training_page(Progress(40, 280, "step 40/280 · loss 6"), curves, moment=now())
    for line in (
        "## train, 14%", "| step | 40 of 280 |", "| loss | 7.5000 → 6.0000 |", "| held-out loss | 8.3700 → 4.8900 |",
        "| throughput | 24,100 tokens/s |", "| memory | 2.3 GB at most, of the first process |", "| time left | 1m 38s |",
    ):  # fmt: skip
        assert line in page, line
    bar, chart = pictures(page)
    assert 'width="91.4"' in bar
    assert ">200<" in chart, "the axis goes on to the last step"
    assert len(page) < 12_000, "it is sent every few seconds"
    assert "| loss |" not in training_page(Progress(0, 280, "starting"), None, moment=now())
    after = stage_page("train", results["train"], workspace, cached=False)
    assert "| held-out loss | 8.3200 | 3.1100 |" in after
    assert len(pictures(after)) == 1


def test_the_page_of_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("".join(f"line {n} ```\n" for n in range(100)))
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / ".k.failed.md").write_text("# t\n## Hidden states\n| model.layers.14 |\n")
    error = StageFailed("verify", "gate failed", "gate failed at layer 14\n       First difference", log_file=log, code=3)
    page = failed_page("verify", error, NodeRecord(path="verify/k", wall_seconds=12), tmp_path)
    for line in (
        "## verify failed after 12s", "gate failed at layer 14\n       First difference", "| reason | gate failed |",
        "| exit code | 3 |", "### Hidden states\n| model.layers.14 |", "````text\nline 60 ```", "line 99",
    ):  # fmt: skip
        assert line in page, line
    assert "line 59" not in page
    gone = StageFailed("train", "killed", "killed", log_file=tmp_path / "none.log", code=-9)
    assert "last lines" not in failed_page("train", gone, NodeRecord(), tmp_path)


def test_the_summary(tmp_path: Path) -> None:
    folder = done_run(tmp_path)
    story = with_artifact(told(folder), "export", metrics={"samples": [{"prompt": "p", "before": HOSTILE, "after": "x"}]})
    page = summary_page(story, code(folder.report))
    for line in (
        "## brisk-otter: done, 3m 20s", "| download\u2011model |", f"| report | `{folder.report}` |",
        "| convert | ✓\u00a0cached |  |", "| train | ✓ | 9.0s | train made |", "### Samples", "<script>alert(1)</script>",
    ):  # fmt: skip
        assert line in page, line
    assert "go on" not in page
    failed = replace(story, record=story.record.model_copy(update={"state": "failed", "error": "verify: no"}))
    page = summary_page(failed, code(folder.report))
    assert "```text\nverify: no\n```" in page
    assert "`finetune rerun brisk-otter`" in page


# ── In Prefect ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def settings(server: Server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: server.api}):
        yield


def artifacts(key: str) -> list[tuple[object, str | None]]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [(artifact.data, artifact.description) for artifact in found]


def test_a_page_is_made_once_and_changed_in_place(settings: None) -> None:
    key = f"page-{uuid4()}"
    board = Board(None)
    board.put(key, "markdown", "one", "first")
    board.put(key, "markdown", "two", "second")
    assert artifacts(key) == [("two", "second")]
    board.put(key, "markdown", "three", "third", is_final=True)
    board.put(key, "markdown", "late", "late")
    assert artifacts(key) == [("three", "third")]
    Board(None).put(key, "markdown", "another run", "its own")
    assert len(artifacts(key)) == 2


def test_training_is_shown_as_it_goes(
    settings: None, made: tuple[Path, dict[str, a.Artifact]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(live, "SECONDS", 0.01)
    workspace, results = made
    spec = TrainSpec.of(config(workspace), weights=results["shard"], dataset=results["preprocess"])
    write_metrics(spec.scratch, metrics_lines(20))
    board = Board(None)
    shown = shown_on(board, spec, uuid4())
    seen: list[str] = []
    context = ContextVar("context", default="none")
    context.set("the task's")  # as Prefect's settings are, and which task run it is

    def show(progress: Progress) -> None:
        shown(progress)
        seen.append(context.get())

    with Live(show, logging.getLogger("test")) as page:
        page.update(Progress(10, 40, "step 10/40 · loss 7.5"))
        wait_until(lambda: len(seen) == 1)
        page.update(Progress(20, 40, "step 20/40 · loss 7.0"))
    assert set(seen) == {"the task's"}
    assert (50.0, "step 20/40 · loss 7.0") in artifacts("train-progress")
    [data] = [data for data, words in artifacts("train") if words == "step 20/40 · loss 7.0"]
    assert "## train, 50%" in str(data)
    assert len(pictures(str(data))) == 2


def test_nobody_waits_for_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(live, "SECONDS", 0.01)
    monkeypatch.setattr(live, "LAST_SECONDS", 0.05)
    hangs, answers, ended = threading.Event(), threading.Event(), threading.Event()

    def show(progress: Progress) -> None:
        hangs.set()
        answers.wait(60)
        ended.set()

    with Live(show, logging.getLogger("test")) as page:
        page.update(Progress(1, 4, ""))
        assert hangs.wait(60)
        for step in range(1000):
            page.update(Progress(step, 1000, ""))
    assert not ended.is_set(), "the stage did not wait for it"
    answers.set()


def test_a_server_that_is_gone_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("FIRST_SECONDS", "SECONDS", "PATIENCE_SECONDS"):
        monkeypatch.setattr(live, name, 0.01)
    tries: list[Progress] = []

    def show(progress: Progress) -> None:
        tries.append(progress)
        if len(tries) < 4:
            raise ConnectionError("refused")

    logger = logging.getLogger("test of a server that is gone")
    with caplog.at_level(logging.WARNING, logger.name), Live(show, logger) as page:
        page.update(Progress(1, 4, ""))
        wait_until(lambda: len(tries) >= 4)
    assert [record.message for record in caplog.records] == ["the page in the UI cannot be refreshed for now: refused"]


def test_a_stage_that_is_soon_done_shows_no_progress() -> None:
    tries: list[Progress] = []
    with Live(tries.append, logging.getLogger("test")) as page:
        page.update(Progress(1, 4, ""))
    assert tries == []
