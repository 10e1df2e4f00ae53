"""Pages in Prefect's UI: what a stage did, how far it is, why it failed."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config, make_results
from stories import HOSTILE, done_run, metrics_lines, told, with_artifact, write_metrics

from flows.launch.protocol import Progress, StageFailed
from flows.records.run_record import NodeRecord, RunFolder, RunRecord, now
from flows.show.pages.failed import failed_page, how_to_go_on
from flows.show.pages.markdown import block, code, table, text
from flows.show.pages.stage import stage_page
from flows.show.pages.summary import summary_page
from flows.show.pages.training import training_page
from stages.contracts import artifacts as a
from stages.contracts.training_curves import curves_in


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
    assert text("https://a.b www.a.b me@a.b") == "https:\u2060//a.b www\u2060.a.b me@\u2060a.b", "no links either"
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
        update={"lengths": {"1": 663, "64": 1096, "1048576": 3}, "malformed_lines": 2, "left_out": {"too long": 4}}
    )
    here = dataset.model_copy(update={"path": "preprocess/x", "sets": (one,)})
    (tmp_path / "preprocess" / "x").mkdir(parents=True)
    lines = [{"source": "d", "file": f"{HOSTILE}.jsonl", "line": 7, "reason": "not JSON"}] * 9
    (tmp_path / "preprocess" / "x" / "malformed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = stage_page("preprocess", here, tmp_path, cached=False)
    assert "| `data` | all | 64 | 4,096 | 64.0 | 64 | 2 malformed, 4 too long |" in page
    [histogram] = pictures(page)
    assert {">1<", ">64 to 127<", ">1,048,576 to 2,097,151<", ">1,096<"} <= set(re.findall(">[^<>]*<", histogram))
    assert page.count("| `7` | `not JSON` |") == 5


def test_the_page_of_a_gate_has_its_table(made: tuple[Path, dict[str, a.Artifact]], tmp_path: Path) -> None:
    verification = made[1]["verify"].model_copy(update={"path": "verify/x"})
    (tmp_path / "verify" / "x").mkdir(parents=True)
    table = b"# title\n\n## Logits\n\n| output of | relative 1e-07 |\n\xff\n"
    (tmp_path / "verify" / "x" / "verification.md").write_bytes(table)
    page = stage_page("verify", verification, tmp_path, cached=False)
    assert "\n### Logits\n\n| output of | relative 1e\u201107 |\n" in page
    assert "# title" not in page


def test_the_page_of_training_while_it_runs_and_after(made: tuple[Path, dict[str, a.Artifact]]) -> None:
    workspace, results = made
    curves = curves_in(results["train"].folder(workspace))
    page = training_page(Progress(40, 280, "step 40/280 · loss 6"), curves, moment=now())
    assert "as of step" not in page
    for line in (
        "## train, 14%", "| step | 40 of 280 |", "| loss | 7.5000 → 6.0000 |", "| held-out loss | 8.3700 → 4.8900 |",
        "| throughput | 24,100 tokens/s |", "| peak memory | 2.3 GB |",
    ):  # fmt: skip
        assert line in page, line
    bar, chart = pictures(page)
    assert 'width="91.4"' in bar
    assert ">200<" in chart, "the axis goes on to the last step"
    assert len(page) < 12_000, "it is sent every few seconds"
    later = training_page(Progress(279, 280, "step 279/280 · loss 5 · 1s left"), curves, moment=now())
    assert "| step | 279 of 280 |\n| figures below | as of step 40 |\n| loss | 7.5000 → 6.0000 |" in later
    assert "## train, 99%" in later
    assert "| loss |" not in training_page(Progress(0, 280, "starting"), None, moment=now())
    figures = {**results["train"].metrics, "loss_test": 3.2, "accuracy_after": 0.42}
    after = stage_page("train", results["train"].model_copy(update={"metrics": figures}), workspace, cached=False)
    for line in (
        "|  | before | after | after, on test |", "| loss | 8.3200 | 3.1100 | 3.2000 |",
        "| perplexity | 4,105 | 22.42 | 24.53 |",
        "| next token right |  | 42.00\u00a0% |  |",
    ):  # fmt: skip
        assert line in after, line
    assert len(pictures(after)) == 1


def test_metrics_that_cannot_be_read_leave_the_page_without_a_curve(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": "one", "loss": "high"}])
    assert curves_in(tmp_path) is None
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    assert curves_in(tmp_path) is None
    assert "## train, 50%" in training_page(Progress(1, 2, ""), None, moment=now())


def failed_run(workspace: Path, node: str, **state: Any) -> tuple[RunFolder, RunRecord]:
    """A run whose node did not end well."""
    folder = RunFolder(workspace, "brisk-otter")
    record = RunRecord(name="brisk-otter", state="failed", config={}, cwd="/", pid=1, started=now(), has_deployment=True)
    record.nodes[node] = NodeRecord(**{"state": "failed", **state})
    return folder, record


def test_the_page_of_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("".join(f"line {n} ```\n" for n in range(100)))
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / ".k.failed.md").write_text("# t\n## Hidden states\n| model.layers.14 |\n")
    told = "gate failed at layer 14\n       First difference"
    folder, record = failed_run(tmp_path, "verify", path="verify/k", wall_seconds=12, error=told)
    page = failed_page("verify", folder, record, StageFailed("verify", "gate failed", told, log_file=log, code=3))
    for line in (
        "## verify failed after 12s", told, "| reason | gate failed |",
        "| exit code | 3 |", "### Hidden states\n| model.layers.14 |", "````text\nline 60 ```", "line 99",
        f"To go on, retry this run, or type:\n\n```text\nfinetune rerun brisk-otter --workspace {tmp_path}\n```",
    ):  # fmt: skip
        assert line in page, line
    assert "line 59" not in page
    no_log = tmp_path / "none.log"
    killed = failed_page("verify", folder, record, StageFailed("verify", "killed", "killed", log_file=no_log, code=-9))
    assert "last lines" not in killed
    assert "Hidden states" not in killed, "the table is of an attempt before"
    defect = failed_page("verify", folder, record, RuntimeError("ours"))
    assert "| reason |" not in defect
    assert "To go on" in defect


def test_how_to_go_on_is_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, record = failed_run(tmp_path / "workspace", "verify", error="no")
    assert how_to_go_on(folder, record).endswith(f" --workspace {tmp_path}/workspace\n```"), "the reader is elsewhere"
    of_terminal = record.model_copy(update={"has_deployment": False})
    assert how_to_go_on(folder, of_terminal).startswith("To go on, type:"), "no runner does it when it is retried"
    of_stage = record.model_copy(update={"stage": "verify", "flow_run_id": "1234"})
    assert how_to_go_on(folder, of_stage).startswith("To go on, type:\n")
    assert "\nprefect flow-run retry 1234\n" in how_to_go_on(folder, of_stage)
    of_stage.page = "http://127.0.0.1:4201/runs/flow-run/1234"
    there = "\nPREFECT_API_URL=http://127.0.0.1:4201/api prefect flow-run retry 1234\n"
    assert there in how_to_go_on(folder, of_stage), "in whichever folder, it is asked of the run's server"
    refused = f"inputs.dataset: {tmp_path}/preprocess/k: data.bin is damaged. Remove {tmp_path}/preprocess/k and run again"
    folder, record = failed_run(tmp_path, "verify", error=refused)
    told = how_to_go_on(folder, record)
    assert told.startswith("To go on, type:"), "retried, it would refuse the same files again"
    assert told.endswith(f"finetune rerun brisk-otter --workspace {tmp_path} --stage preprocess\n```")


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
    story.record.nodes["verify"] = NodeRecord(state="failed", error="no: 99.9 % *")
    failed = replace(story, record=story.record.model_copy(update={"state": "failed", "error": "verify: no"}))
    page = summary_page(failed, code(folder.report))
    assert "```text\nverify: no\n```" in page
    assert f"finetune rerun brisk-otter --workspace {tmp_path}\n" in page
    assert "| verify | ✗\u00a0failed |  | no: 99.9\u00a0% \\* |" in page
