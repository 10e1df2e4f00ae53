"""The report: everything that is known of a run, in one file that needs nothing else, whatever others wrote into it."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from stories import GATES, HOSTILE, done_run, metrics_lines, told, with_artifact, with_file, write_metrics

from flows.records.run_record import NodeRecord, RunFolder, RunState
from flows.records.story import story_of
from flows.show.ending import tell_end
from flows.show.pages.board import Board, Data, Kind
from flows.show.report.lineage_graph import _edges, lineage_graph
from flows.show.report.sections import charts
from flows.show.report.write import render, write_report
from stages.contracts import artifacts as a
from stages.contracts.specs import SPECS, refused_of, scratch_of

FLOW_RUN = "0b0d8a3e-0000-4000-8000-000000000000"
LAST = {"step": 100, "valid_loss": 4.8}
VOID = {"meta", "path", "rect", "circle", "br"}


class Page(HTMLParser):
    """Reads HTML strictly: tags that are closed in order, the text, what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


class Kept(Board):
    """Keeps what it is to show, instead of sending it."""

    def __init__(self, flow_run_id: str | None) -> None:
        super().__init__(flow_run_id)
        self.pages: dict[str, object] = {}

    def put(self, key: str, kind: Kind, data: Data, words: str, **about: Any) -> None:
        self.pages[key] = data


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return done_run(tmp_path)


def test_everything_of_a_run_is_in_it(folder: RunFolder) -> None:
    story = with_file(told(folder), "verify", "verification.json", json.dumps(GATES))
    text = Page(render(story)).text
    for wanted in (
        "brisk-otter", "done", "held-out loss8.32 → 3.11", "perplexity4,105 → 22.4", "2.3 GB",  # what it came to
        "learning rate", "gradient norm", "tokens per second", "8.37", "4.89",  # the curves
        "def read(", "self, size=-1):",  # samples
        *SPECS, "cached", story.artifacts["train"].fingerprint, story.artifacts["train"].files["content.txt"].blake3[:32],
        "mean |Δlogit|", "100 %", "not finite", "model.layers.29.mlp", "8.7e-06",  # gates
        "|Δloss|, padding", "argmax agreement, padding98.76 %48 tokens, not judged",
        "4,096", "somebody/model", "sequence_length: 16", "global_batch_size",  # data, configuration
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "To go on" not in text


def test_questions_that_were_asked(folder: RunFolder) -> None:
    asked = [{"question": f"q{n}?", "answer": f"right{n}", "before": "??", "after": f"right{n}"} for n in range(9)]
    story = with_artifact(told(folder), "export", metrics={"answers": {"questions": 9, "before": 0.0, "after": 0.875}})
    (story.artifacts["export"].folder(folder.workspace) / "answers.json").write_text(json.dumps(asked))
    text = Page(render(story)).text
    assert "right answers0% → 87%" in text
    assert [f"q{n}?" in text for n in range(4)] == [True, True, True, False], "the first three"
    assert "wanted" in text
    assert "right answers to 9 questions0.00 %87.50 %" in text
    of_the_end = with_artifact(story, "export", metrics={"answers": {"questions": 9, "after": 0.875}})
    assert "right answers to 9 questions87.50 %" in Page(render(of_the_end)).text


def test_a_run_of_one_stage_and_where_it_published(folder: RunFolder) -> None:
    record = folder.read()
    assert record is not None
    folder.write(record.model_copy(update={"stage": "push", "cwd": "/home/me"}))
    story = with_artifact(told(folder), "push", to="folder", target="workspace/hub")
    text = Page(render(story)).text
    assert "stage/push" in text
    assert "finetune-llama2" not in text
    assert "published to /home/me/workspace/hub" in text
    assert with_artifact(story, "push", to="folder", target="/hub").published() == "/hub"
    assert with_artifact(story, "push", to="hub", target="me/model").published() == "me/model"


def test_all_charts_end_where_training_did(folder: RunFolder) -> None:
    """On held-out data a loss is told of the last step, which may be logged no more."""
    write_metrics(folder.workspace / str(told(folder).record.nodes["train"].path), [*metrics_lines(), LAST])
    ticks = [re.findall(r'text-anchor="middle">([^<]+)<', chart) for chart in charts(told(folder))]
    assert ticks == [["0", "50", "100"]] * 4


def test_it_needs_nothing_else_and_runs_nothing(folder: RunFolder) -> None:
    html = render(told(folder))
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src", "xlink:href"))
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(html) < 200_000


def test_words_of_others_stay_words(folder: RunFolder) -> None:
    record = folder.read()
    assert record is not None
    record.config["model"]["source"] = HOSTILE
    record.nodes["push"] = NodeRecord(state="failed", error=f"push: {HOSTILE}")
    record.state, record.error = "failed", f"push: {HOSTILE}"
    folder.write(record)
    folder.log("push").write_text(f"{HOSTILE}\n")
    story = with_artifact(
        told(folder), "export", figure=HOSTILE,
        metrics={"samples": [{"prompt": HOSTILE, "before": HOSTILE, "after": f"{HOSTILE}\n{HOSTILE}"}]},
    )  # fmt: skip
    story = with_file(story, "train", HOSTILE.replace("/", ""), "")
    page = Page(render(story))
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 7
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_a_run_that_failed_says_why(folder: RunFolder) -> None:
    record = folder.read()
    assert record is not None
    partial = scratch_of(folder.workspace / str(record.nodes["train"].path))
    (folder.workspace / str(record.nodes["train"].path)).rename(partial)  # what an unfinished training leaves
    for node in ("train", "merge", "export", "push"):
        path = record.nodes[node].path if node == "train" else None
        record.nodes[node] = NodeRecord(state="failed" if node == "train" else "waiting", path=path)
    record.nodes["train"].error = "rank 3 ran out of memory in step 41"
    record.state, record.error = "failed", "train: rank 3 ran out of memory in step 41"
    folder.write(record)
    folder.log("train").write_text("".join(f"line {n}\n" for n in range(100)))
    page = Page(render(told(folder)))
    assert "train failed" in page.text
    assert "The run was stopped" not in page.text
    assert "finetune rerun brisk-otter" in page.text
    assert "rank 3 ran out of memory" in page.text
    assert "line 99" in page.text
    assert "line 1\n" not in page.text
    assert "learning rate" in page.text, "the curves of what there was"
    assert "not run" in page.text
    assert {("href", "#train"), ("id", "train"), ("href", "#shard"), ("id", "shard")} <= set(page.attributes)
    assert ("href", "#merge") not in page.attributes, "the page tells no more of it"


@pytest.mark.parametrize(
    ("state", "error", "wanted"),
    [
        ("stopped", "cancelled in Prefect", "The run was stopped\ncancelled in Prefect\nTo go on, type:"),
        ("stopped", "stopped", "The run was stopped\nTo go on, type:"),  # by Ctrl-C
        ("crashed", "its process is gone", "The run did not end well\nits process is gone\nTo go on, type:"),
    ],
)
def test_a_run_that_was_stopped_is_none_that_failed(folder: RunFolder, state: RunState, error: str, wanted: str) -> None:
    record = folder.read()
    assert record is not None
    result = folder.workspace / str(record.nodes["train"].path)
    result.rename(scratch_of(result))
    record.nodes["train"] = NodeRecord(state="stopped", error="stopped", path=record.nodes["train"].path)
    record.nodes |= {node: NodeRecord() for node in ("merge", "export", "push")}
    record.state, record.error = state, error
    page = Page(render(story_of(folder, record)))
    assert (("class", "failure") in page.attributes) is (state != "stopped")
    told = re.sub(r"\n+", "\n", page.text)
    assert f"{wanted}\nfinetune rerun brisk-otter --workspace {folder.workspace}\nloss" in told, "above all figures"
    assert "loss7.50 → 6.00, step 40" in page.text
    assert "held-out loss8.37 → 4.89, step 40" in page.text


def test_a_training_that_failed_has_its_own_curves(folder: RunFolder) -> None:
    record = folder.read()
    assert record is not None
    result = folder.workspace / str(record.nodes["train"].path)
    write_metrics(scratch_of(result), metrics_lines(10))  # done again: the old result stays until the new one is there
    record.nodes["train"].state = "failed"
    curves = story_of(folder, record).curves
    assert curves is not None
    assert [step for step, _ in curves.loss] == [10]
    shutil.rmtree(scratch_of(result))
    assert story_of(folder, record).curves is None, "of one that never began there are none"
    record.nodes["train"].state = "cached"
    curves = story_of(folder, record).curves
    assert curves is not None
    assert [step for step, _ in curves.loss] == [10, 20, 30, 40]


def test_all_that_made_the_results_is_told(folder: RunFolder) -> None:
    story = told(folder)
    older = story.artifacts["convert"].versions.model_copy(update={"torch": "2.1.0", "libraries": {"safetensors": "0.4.0"}})
    files = {f"{n}.bin": a.FileRecord(size=n, blake3="0" * 64) for n in range(300)}
    text = Page(render(with_artifact(story, "convert", versions=older, files=files))).text
    assert f" · torch 2.1.0, {story.artifacts['train'].versions.torch}" in text
    assert "safetensors 0.4.0" in text
    assert "300 files, 44.9 kB, the 100 smallest left out here" in text


def test_a_gate_that_refused_shows_its_table(folder: RunFolder) -> None:
    record = folder.read()
    assert record is not None
    path = folder.workspace / str(record.nodes["verify"].path)
    record.nodes["verify"] = NodeRecord(state="failed", error="gate failed at layer 14", path=record.nodes["verify"].path)
    folder.write(record)
    refused_of(path).write_text(json.dumps(GATES))  # as the gate leaves it
    text = Page(render(told(folder))).text
    assert "gate failed at layer 14" in text
    assert "model.layers.29.mlp" in text


def test_a_run_of_which_next_to_nothing_is_known_has_a_report(tmp_path: Path) -> None:
    folder = done_run(tmp_path)
    record = folder.read()
    assert record is not None
    record.nodes = {node: NodeRecord() for node in SPECS}
    record.config, record.state, record.error = {}, "crashed", "its process is gone"
    folder.write(record)
    assert "its process is gone" in Page(render(told(folder))).text
    tell_end(folder, Board(None))
    assert folder.report.stat().st_size > 1000


def test_a_report_that_cannot_be_written_is_no_failure(folder: RunFolder) -> None:
    folder.report.mkdir()
    with pytest.raises(OSError, match="report"):
        write_report(told(folder))
    board = Kept(None)
    tell_end(folder, board)
    assert f"| report | `{folder.report}` could not be written: `[Errno 21] Is a directory" in board.pages["summary"]


@pytest.fixture
def served(folder: RunFolder) -> Iterator[Path]:
    """Where the workspace's server has the files of its UI. Prefect's settings of this process name that server."""
    home = folder.workspace / "prefect"
    (home / "ui" / "v1").mkdir(parents=True)
    (home / "server.json").write_text(json.dumps({"api": "http://127.0.0.1:9/api", "pid": 1}))
    record = folder.read()
    assert record is not None
    folder.write(record.model_copy(update={"flow_run_id": FLOW_RUN}))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield home / "ui" / "v1"


def test_the_summary_opens_the_report_where_anybody_may_who_sees_it(folder: RunFolder, served: Path) -> None:
    board = Kept(None)
    tell_end(folder, board)
    assert f"| report | [open it](/reports/{FLOW_RUN}.html), or `{folder.report}` |" in board.pages["summary"]
    assert (served / "reports" / f"{FLOW_RUN}.html").read_bytes() == folder.report.read_bytes()


def test_a_copy_that_cannot_be_made_costs_the_link_alone(folder: RunFolder, served: Path) -> None:
    (served / "reports").touch()
    board = Kept(None)
    tell_end(folder, board)
    assert f"| report | `{folder.report}` |" in board.pages["summary"]
    assert folder.report.is_file()


def test_a_server_with_a_login_hands_out_no_report_without_it(folder: RunFolder, served: Path) -> None:
    board = Kept(None)
    with temporary_settings({PREFECT_API_AUTH_STRING: "me:secret"}):
        tell_end(folder, board)
    assert f"| report | `{folder.report}` |" in board.pages["summary"]
    assert not (served / "reports").exists()


def test_the_lineage_draws_every_node_and_what_follows_from_what() -> None:
    assert _edges() == [
        ("download-model", "preprocess"), ("download-data", "preprocess"), ("download-model", "convert"), ("convert", "shard"),
        ("preprocess", "verify"), ("shard", "verify"), ("verify", "train"), ("train", "merge"), ("merge", "export"),
        ("export", "push"),
    ]  # fmt: skip
    svg = lineage_graph({node: NodeRecord() for node in SPECS}, {}, ())
    boxes = [tuple(map(float, box)) for box in re.findall(r'class="node" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(set(boxes)) == len(SPECS)
    assert svg.count('class="edge gate"') == 1
