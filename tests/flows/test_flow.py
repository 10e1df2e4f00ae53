"""The flow against a real Prefect server, with stand-in stages: what runs, what is reused, what is seen."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_stages import InProcess, config
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.context import _temporary_global_settings_context, get_settings_context
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_RESULTS_LOCAL_STORAGE_PATH,
    temporary_settings,
)
from processes import wait_until

from flows.finetune import Node, finetune
from flows.graph import with_dependents
from flows.launch import choose
from flows.launch.protocol import StageFailed
from flows.run_record import LiveRecord, RunFolder, RunRecord, now
from flows.server import Server
from flows.settle import reconcile
from stages.contracts import artifacts as a
from stages.contracts.specs import SPECS

ALL = list(SPECS)
AFTER_VERIFY = ["train", "merge", "export", "push"]


class World:
    """A workspace, stand-in stages, and the flow."""

    def __init__(self, workspace: Path, launcher: InProcess) -> None:
        self.workspace = workspace
        self.launcher = launcher

    def run(self, name: str, refresh: list[Node] | None = None, **train: Any) -> RunRecord:
        """Run the flow; `launcher.ran` then holds what ran this time."""
        self.launcher.ran.clear()
        finetune(config=config(self.workspace, **train), run_name=name, refresh=refresh or [])
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
    launcher = InProcess()
    monkeypatch.setattr(choose, "launcher_for", lambda config: launcher)
    settings = {
        PREFECT_API_URL: server.api,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "prefect" / "results",
    }
    with temporary_settings(settings), _temporary_global_settings_context(get_settings_context()):
        yield World(tmp_path, launcher)


def states(record: RunRecord) -> dict[str, str]:
    return {node: state.state for node, state in record.nodes.items()}


def task_states(record: RunRecord) -> dict[str, str]:
    """Names of the task runs' states, as far as Prefect knows them: it learns of them by events, a moment later."""
    assert record.flow_run_id is not None
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[record.flow_run_id])))
    return {run.name: run.state_name or "" for run in found}


def test_run_then_all_cached_then_another_learning_rate(world: World) -> None:
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

    other = world.run("other", lr=1e-4)
    assert world.launcher.ran == AFTER_VERIFY
    assert [node for node, state in states(other).items() if state == "cached"] == ALL[:6]

    # Prefect's own records are a convenience: without them the folders still count.
    shutil.rmtree(world.workspace / "prefect")
    world.run("without")
    assert world.launcher.ran == []
    # And without the folders, the records do not.
    shutil.rmtree(world.workspace / "merge")
    merged = world.run("missing")
    assert world.launcher.ran == ["merge"]
    assert states(merged)["export"] == "cached"  # the same bits again


def test_data_that_training_could_not_begin_with(world: World) -> None:
    with pytest.raises(
        StageFailed, match=r"^train: train\.split=.* one sample needs 513\. Set train\.split to .80,20,0., or lower"
    ):
        world.run("one", sequence_length=512)
    assert set(world.launcher.ran) <= {"download-model", "download-data", "preprocess", "convert", "shard"}
    record = world.record("one")
    assert (record.state, record.nodes["train"].state) == ("failed", "failed")
    assert (world.folder_of_dataset() / a.ARTIFACT_FILE).exists(), "the data are not to blame"
    assert states(world.run("two"))["preprocess"] == "cached"


def test_order_and_pages(world: World) -> None:
    record = world.run("run")
    ran = world.launcher.ran
    assert ran.index("shard") < ran.index("verify") < ran.index("train") < ran.index("merge") < ran.index("push")
    assert record.flow_run_id is not None
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[record.flow_run_id]))
    with get_client(sync_client=True) as client:
        pages = {page.key: page for page in client.read_artifacts(artifact_filter=wanted)}
        assert client.read_flow_run(record.flow_run_id).name == "run"
    assert set(ALL) <= set(pages)
    assert str(pages["train"].data).startswith("## train\n**train made**")
    assert pages["train-progress"].data == 50.0


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
    assert a.find_intact(folder) == created
    assert not list(folder.parent.glob(".*.replaced"))

    world.launcher.failing.clear()
    refresh = with_dependents(["train"])
    again = world.run("run", refresh=refresh)  # type: ignore[arg-type]
    assert world.launcher.ran == AFTER_VERIFY
    assert states(again)["shard"] == "cached"
    assert (folder / "content.txt").stat().st_mtime_ns > written
    assert not list(folder.parent.glob(".*.replaced"))
    world.run("run")
    assert world.launcher.ran == []


def test_names_that_are_none_are_refused(world: World) -> None:
    with pytest.raises(Exception, match="refresh"):
        world.run("run", refresh=["trian"])  # type: ignore[list-item]
    with pytest.raises(Exception, match="run_name"):
        world.run("../run")
    assert set(Node.__args__) == set(SPECS)  # type: ignore[attr-defined]


def test_runs_of_dead_processes_are_marked(world: World) -> None:
    done = world.run("run")
    folder = RunFolder(world.workspace, "dead")
    folder.path.mkdir()
    with get_client(sync_client=True) as client:
        from prefect.states import Running

        flow_run = client.create_flow_run(finetune, name="dead", state=Running())
    dead = RunRecord(name="dead", config={}, cwd="/", pid=1, started=now(), flow_run_id=str(flow_run.id))
    LiveRecord(folder, dead).node("train", state="running", done=0.3)
    assert reconcile(world.workspace) == ["dead"]
    assert reconcile(world.workspace) == []
    record = world.record("dead")
    assert (record.state, record.nodes["train"].state) == ("crashed", "stopped")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run.id).state_name == "Crashed"
    assert world.record("run") == done
