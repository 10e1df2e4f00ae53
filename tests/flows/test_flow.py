"""The flow against a real Prefect server, with stand-in stages: what runs, what is reused, what is seen."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from fake_stages import InProcess, config, make_results
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact
from prefect.context import _temporary_global_settings_context, get_settings_context
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_RESULTS_LOCAL_STORAGE_PATH,
    temporary_settings,
)
from prefect.states import Running
from processes import wait_until

from flows import tasks
from flows.finetune import Node, finetune
from flows.launch import choose
from flows.launch.protocol import StageFailed
from flows.records.run_record import LiveRecord, RunFolder, RunRecord, now
from flows.running import run_stage, settle
from flows.running.run import Run
from flows.running.settle import reconcile
from flows.running.turns import in_turn
from flows.server.local import Server
from flows.show.pages import board
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import SPECS, Spec, scratch_of

ALL = list(SPECS)
AFTER_VERIFY = ["train", "merge", "export", "push"]


class World:
    """A workspace, stand-in stages, and the flow."""

    def __init__(self, workspace: Path, launcher: InProcess) -> None:
        self.workspace = workspace
        self.launcher = launcher
        self.launchers: list[tuple[str, frozenset[str]]] = []  # that were asked for: what starts stages, and which

    def run(
        self, name: str, refresh: list[Node] | None = None, *, fresh: bool = False, start_from: list[str] | None = None,
        **train: Any,
    ) -> RunRecord:  # fmt: skip
        """Run the flow; `launcher.ran` then holds what ran this time."""
        self.launcher.ran.clear()
        asked = config(self.workspace, **train)
        finetune(config=asked, run_name=name, refresh=refresh or [], fresh=fresh, start_from=start_from or [])
        return self.record(name)

    def folder_of_dataset(self) -> Path:
        [folder] = (path for path in (self.workspace / "preprocess").iterdir() if path.is_dir())
        return folder

    def record(self, name: str) -> RunRecord:
        record = RunFolder(self.workspace, name).read()
        assert record is not None
        return record


@pytest.fixture
def world(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, InProcess())

    def launcher_for(config: PipelineConfig, stages: frozenset[str]) -> InProcess:
        world.launchers.append((config.launch.by, stages))
        return world.launcher

    monkeypatch.setattr(choose, "launcher_for", launcher_for)
    monkeypatch.setattr(board, "LAST_SECONDS", 60.0)  # on a busy machine, too, all pages are there at the end
    settings = {
        PREFECT_API_URL: server.api,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "prefect" / "results",
    }
    with temporary_settings(settings), _temporary_global_settings_context(get_settings_context()):
        yield world


def states(record: RunRecord) -> dict[str, str]:
    return {node: state.state for node, state in record.nodes.items()}


def task_states(record: RunRecord) -> dict[str, str]:
    """Names of the task runs' states, as far as Prefect knows them: it learns of them by events, a moment later."""
    assert record.flow_run_id is not None
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[record.flow_run_id])))
    return {run.name: run.state_name or "" for run in found}


def pages_of(record: RunRecord) -> dict[str | None, Artifact]:
    """What a run shows in Prefect's UI, by key."""
    assert record.flow_run_id is not None
    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(record.flow_run_id)]), type=ArtifactFilterType(not_any_=["result"])
    )
    with get_client(sync_client=True) as client:
        return {page.key: page for page in client.read_artifacts(artifact_filter=wanted)}


def test_run_then_all_cached_then_another_learning_rate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.run("first")
    assert sorted(world.launcher.ran) == sorted(ALL)
    assert (first.state, set(states(first).values())) == ("done", {"ran"})
    assert (first.nodes["train"].figure, first.nodes["train"].error) == ("train made", None)
    exported = world.workspace / "runs" / "first" / "export" / "content.txt"
    assert exported.read_text().startswith("export ")
    assert (world.workspace / "runs" / "first" / "specs" / "train.json").exists()

    again = world.run("again")
    assert world.launcher.ran == []
    assert set(states(again).values()) == {"cached"}
    wait_until(lambda: task_states(again) == dict.fromkeys(ALL, "Cached"))
    assert (world.workspace / "runs" / "again" / "export" / "content.txt").read_text() == exported.read_text()

    waited = [0.0]

    @contextmanager
    def waiting(run: Run, spec: Spec) -> Iterator[tuple[int, ...]]:
        with in_turn(run, spec) as holds:
            waited[0] += 1e6
            yield holds

    monkeypatch.setattr(run_stage, "in_turn", waiting)
    monkeypatch.setattr(run_stage, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + waited[0]))
    other = world.run("other", lr=1e-4)
    assert world.launcher.ran == AFTER_VERIFY
    assert [node for node, state in states(other).items() if state == "cached"] == ALL[:6]
    assert all((other.nodes[node].wall_seconds or 0) < 1e6 for node in AFTER_VERIFY), "to wait for one's turn is no work"

    # What `auto` is was decided before the first stage; and each launcher knew what it was for.
    assert world.launchers == [("process", frozenset(nodes)) for nodes in (ALL, [], AFTER_VERIFY)]

    # Prefect's own records are a convenience: without them the folders still count.
    shutil.rmtree(world.workspace / "prefect")
    world.run("without")
    assert world.launcher.ran == []
    # And without the folders, the records do not.
    shutil.rmtree(world.workspace / "merge")
    merged = world.run("missing")
    assert world.launcher.ran == ["merge"]
    assert states(merged)["export"] == "cached"  # the same bits again


def test_a_result_of_another_workspace_is_none_of_this_one(world: World) -> None:
    world.run("run")
    world.launcher.ran.clear()
    other = world.workspace / "other"
    finetune(config=config(other), run_name="run")  # Prefect's records are those of before
    assert sorted(world.launcher.ran) == sorted(ALL)
    assert (other / "runs" / "run" / "export" / "content.txt").exists()


def test_data_that_training_could_not_begin_with(world: World) -> None:
    with pytest.raises(
        StageFailed, match=r"^train: train\.split=.* one sample needs 513\. Set train\.split to .80,20,0., or lower"
    ):
        world.run("one", sequence_length=512)
    assert set(world.launcher.ran) <= {"download-model", "download-data", "preprocess", "convert", "shard"}
    record = world.record("one")
    assert (record.state, record.nodes["train"].state, record.nodes["preprocess"].state) == ("failed", "failed", "ran")
    pages = pages_of(record)
    assert str(pages["train"].data).startswith("## train failed\n\n```text\ntrain.split=")
    assert str(pages["preprocess"].data).startswith("## preprocess\n\nRan in ")
    assert (world.folder_of_dataset() / a.ARTIFACT_FILE).exists(), "the data are not to blame"
    assert states(world.run("two"))["preprocess"] == "cached"


def test_order_and_pages(world: World) -> None:
    record = world.run("run")
    ran = world.launcher.ran
    assert ran.index("shard") < ran.index("verify") < ran.index("train") < ran.index("merge") < ran.index("push")
    pages = pages_of(record)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(record.flow_run_id)).name == "run"
    assert set(pages) == {*ALL, "summary"}, "stages that are done at once show no progress"
    assert all(pages[node].task_run_id is not None for node in ALL)
    assert str(pages["train"].data).startswith("## train\n\nRan in ")
    assert pages["train"].description == "train made"
    assert str(pages["summary"].data).startswith("## run: done")
    assert "train made" in RunFolder(world.workspace, "run").report.read_text()


def test_a_stage_that_takes_its_time_shows_how_far_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "FIRST_SECONDS", 0.0)
    seen = {}

    def until_it_is_shown(node: str) -> None:
        if node == "train":
            wait_until(lambda: {"train", "train-progress"} <= set(pages_of(world.record("run"))))
            seen.update({key: page.data for key, page in pages_of(world.record("run")).items()})

    monkeypatch.setattr(world.launcher, "before", until_it_is_shown)
    pages = pages_of(world.run("run"))
    assert seen["train-progress"] == 50.0
    assert str(seen["train"]).startswith("## train, 50%")
    assert (pages["train-progress"].data, pages["train-progress"].description) == (100.0, "train made")
    assert str(pages["train"].data).startswith("## train\n\nRan in "), "the page of the end, not the one under way"


def test_a_failed_gate_stops_what_follows_and_a_rerun_goes_on(world: World) -> None:
    world.launcher.fail("verify", "gate failed at layer 14")
    with pytest.raises(StageFailed, match="verify: gate failed at layer 14"):
        world.run("run")
    failed = world.record("run")
    assert (failed.state, failed.error) == ("failed", "verify: gate failed at layer 14")
    assert states(failed) == {
        **dict.fromkeys(ALL, "waiting"),
        **dict.fromkeys(("download-model", "download-data", "preprocess", "convert", "shard"), "ran"),
        "verify": "failed",
    }
    assert "train" not in world.launcher.ran
    wait_until(lambda: task_states(failed).get("verify") == "Failed")
    pages = pages_of(failed)
    assert "gate failed at layer 14" in str(pages["verify"].data)
    assert f"finetune rerun run --workspace {world.workspace}\n" in str(pages["summary"].data)
    assert "gate failed at layer 14" in RunFolder(world.workspace, "run").report.read_text()

    world.launcher.failing.clear()
    assert world.run("run").state == "done"
    assert world.launcher.ran == ["verify", *AFTER_VERIFY]


def test_refresh_does_it_again_and_keeps_the_old_result_until_then(world: World) -> None:
    first = world.run("run")
    folder = world.workspace / str(first.nodes["train"].path)
    created = a.load_artifact(folder)
    written = (folder / "content.txt").stat().st_mtime_ns

    world.launcher.fail("train", "no")
    with pytest.raises(StageFailed):
        world.run("run", refresh=["train"])
    assert intact.find_intact(folder) == created
    assert not list(folder.parent.glob(".*.replaced"))

    world.launcher.failing.clear()
    again = world.run("run", refresh=["train"])
    assert world.launcher.ran == AFTER_VERIFY
    assert states(again)["shard"] == "cached"
    assert (folder / "content.txt").stat().st_mtime_ns > written
    assert not list(folder.parent.glob(".*.replaced"))
    folder.rename(folder.parent / f".{folder.name}.replaced")  # as kill -9 of a run leaves it that makes the result again
    world.run("run")
    assert world.launcher.ran == []
    assert intact.find_intact(folder) is not None
    assert not list(folder.parent.glob(".*.replaced"))


def test_training_goes_on_or_begins_anew(world: World) -> None:
    folder = make_results(config(world.workspace), until="train")["train"].folder(world.workspace)
    scratch = scratch_of(folder)
    for fresh in (False, True):
        scratch.mkdir()
        (scratch / "checkpoint").write_text("of an interrupted training")
        world.run("run", refresh=["train"], fresh=fresh)
        assert world.launcher.ran == AFTER_VERIFY
        assert (folder / "checkpoint").exists() is not fresh


def test_a_run_that_starts_from_a_result(world: World) -> None:
    trained = make_results(config(world.workspace))["train"].path
    started = world.run("started", start_from=[trained], lr=0.5)  # this would be another training
    assert world.launcher.ran == []
    assert (started.nodes["train"].path, started.start_from) == (trained, [trained])
    assert set(states(started).values()) == {"cached"}
    shutil.rmtree(world.workspace / "merge")
    shutil.rmtree(world.workspace / "prefect")
    world.run("started", start_from=[trained], lr=0.5)
    assert world.launcher.ran == ["merge"]


def test_names_that_are_none_are_refused(world: World) -> None:
    with pytest.raises(Exception, match="refresh"):
        world.run("run", refresh=["trian"])  # type: ignore[list-item]
    with pytest.raises(Exception, match="run_name"):
        world.run("../run")
    assert set(Node.__args__) == set(SPECS)  # type: ignore[attr-defined]


def test_runs_of_dead_processes_are_marked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = RunRecord(name="run", config={}, cwd="/", pid=1, started=now(), finished=now(), state="done")
    for name in ("run", "dead"):
        RunFolder(world.workspace, name).path.mkdir(parents=True)
    RunFolder(world.workspace, "run").write(done)
    folder = RunFolder(world.workspace, "dead")
    # The runner's own workspaces are others: that this one is to be settled, the server's runs tell.
    parameters = {"config": config(Path("elsewhere")).model_dump(mode="json"), "overrides": [f"workspace={world.workspace}"]}
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(finetune, name="dead", parameters=parameters, state=Running())
        began = {
            node: client.create_task_run(task, flow_run.id, "0", name=node, state=Running()).id
            for node, task in (("preprocess", tasks.preprocess), ("train", tasks.train))
        }
        dead = RunRecord(name="dead", config={}, cwd="/", pid=1, started=now(), flow_run_id=str(flow_run.id))
        record = LiveRecord(folder, dead)
        record.node("preprocess", state="ran")  # of which Prefect has not heard
        record.node("train", state="running", done=0.3)
        settle.settle(finetune, client.read_flow_run(flow_run.id), Running())  # as a runner that saw the process die
        assert {node: client.read_task_run(each).state_name for node, each in began.items()} == {
            "preprocess": "Completed", "train": "Crashed",
        }  # fmt: skip
        going_on = settle._going_on
        # Other tests' runs go on side by side, on the same server.
        monkeypatch.setattr(settle, "_going_on", lambda client: [run for run in going_on(client) if run.id == flow_run.id])
        assert reconcile([]) == ["dead"]
        assert reconcile([]) == []
        assert client.read_flow_run(flow_run.id).state_name == "Crashed"
    crashed = world.record("dead")
    assert (crashed.state, crashed.nodes["train"].state) == ("crashed", "stopped")
    assert "its process is gone" in folder.report.read_text()
    pages = pages_of(crashed)
    assert str(pages["train"].data).startswith("## train was stopped")
    assert str(pages["summary"].data).startswith("## dead: crashed")
    assert world.record("run") == done
