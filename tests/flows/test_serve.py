"""A runner with real processes and a real server: deployments, retries, and every way in which something can be killed."""

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Running, Scheduled
from processes import lives, wait_until
from runners import ROOT, Seen, Serving

from flows.finetune import finetune
from flows.records.run_record import RunFolder, RunRecord, now
from flows.server.local import Server

BEFORE_TRAIN = ["download-model", "download-data", "preprocess", "convert", "shard", "verify"]
AFTER_TRAIN = ["merge", "export", "push"]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Serving]:
    """A runner, whose workspace has all results up to the verification."""
    runner = Serving(tmp_path_factory.mktemp("serve"), server.api, "demo")
    try:
        runner.make(until="verify")
        runner.wait_until_said("stop         Ctrl-C")
        yield runner
    finally:
        runner.end()


@pytest.fixture(scope="module")
def seen(server: Server) -> Iterator[Seen]:
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        yield Seen(client)


def states(record: RunRecord, *nodes: str) -> list[str]:
    return [record.nodes[node].state for node in nodes]


def test_run_fail_retry(serving: Serving, seen: Seen) -> None:
    """As README says: start with overrides, see it fail, retry in the UI and in the terminal."""
    serving.wish("train", "fail")
    made = serving.cli(
        "deployment", "run", "finetune-llama2/demo", "-p", 'overrides=["train.lr=2e-4"]', "-p", "run_name=patient-crane"
    )
    assert made.returncode == 0, made.stderr
    wait_until((serving.workspace / "runs" / "patient-crane" / "run.json").exists)
    first = seen.client.read_flow_run(serving.record("patient-crane").flow_run_id)  # type: ignore[arg-type]
    seen.wait_for(first.id, "Failed")
    assert first.name == "patient-crane"
    assert "train: RuntimeError: a defect" in seen.message(first.id)
    record = serving.record("patient-crane")
    assert (record.state, record.attempt, record.config["train"]["lr"]) == ("failed", 1, 2e-4)
    assert states(record, *BEFORE_TRAIN, "train") == [*["cached"] * 6, "failed"]

    serving.wish("train", "gate")  # the button in the UI does this
    seen.client.set_flow_run_state(first.id, Scheduled(name="AwaitingRetry"), force=True)
    wait_until(lambda: serving.record("patient-crane").attempt == 2)
    seen.wait_for(first.id, "Failed")
    assert "gate failed at layer 1" in seen.message(first.id)

    serving.wish("train", "")
    retried = serving.cli("flow-run", "retry", "patient-crane")
    assert retried.returncode == 0, retried.stderr
    seen.wait_for(first.id, "Completed")
    record = serving.record("patient-crane")
    assert (record.state, record.attempt) == ("done", 3)
    assert states(record, *BEFORE_TRAIN) == ["cached"] * 6
    assert states(record, "train", *AFTER_TRAIN) == ["ran"] * 4
    wait_until(lambda: seen.tasks(first.id)["train"] == ["Failed", "Failed", "Completed"])
    assert seen.tasks(first.id)["shard"] == ["Cached"] * 3
    assert "patient-crane  started" in serving.said()
    assert "Traceback" not in serving.said()


def test_the_command_as_the_readme_has_it(serving: Serving) -> None:
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("prefect deployment run")]
    done = serving.cli(*shlex.split(line)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finetune-llama2/demo" in line
    assert "--watch" in line
    assert "Flow run finished successfully in 'Completed'." in " ".join(done.stdout.split())


def test_what_is_wrong_is_said(serving: Serving, seen: Seen) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        seen.start("finetune-llama2/demo", refresh=["trian"])
    assert "'trian' is not one of" in refused.value.response.text
    wrong = seen.start("finetune-llama2/demo", overrides=["train.optimiser=sgd"])
    seen.wait_for(wrong.id, "Failed")
    assert "overrides: train.optimiser=sgd: unknown key. Did you mean train.optimizer?" in seen.message(wrong.id)
    assert not (serving.workspace / "runs" / wrong.name).exists()
    nowhere = seen.start("finetune-llama2/demo", overrides=["model.source=/nowhere"])
    hosts = {"by": "docker", "hosts": ["unix:///nowhere.sock"]}
    engine = seen.start("stage/train", start_from=results(serving), train={"steps": 2, "sequence_length": 16}, launch=hosts)
    for run, told in ((nowhere, "config: model.source: /nowhere: no such file"), (engine, "launch: ")):
        seen.wait_for(run.id, "Failed")
        assert told in seen.message(run.id)
    assert "no Docker engine answers at /nowhere.sock" in seen.message(engine.id)
    assert "train" not in seen.tasks(engine.id)


def test_one_stage_from_a_result(serving: Serving, seen: Seen) -> None:
    made = seen.start(
        "stage/train",
        start_from=results(serving),
        train={"steps": 2, "sequence_length": 16},
        overrides=["train.lr=7e-4"],
        run_name="just-training",
    )
    seen.wait_for(made.id, "Completed")
    record = serving.record("just-training")
    assert (record.stage, record.config["train"]["lr"]) == ("train", 7e-4)
    assert [node for node, state in record.nodes.items() if state.state == "cached"] == BEFORE_TRAIN[:-1]
    assert [node for node, state in record.nodes.items() if state.state == "ran"] == ["train"]
    assert list(seen.tasks(made.id)) == ["train"]


def results(serving: Serving) -> list[str]:
    """What a training starts from."""
    found = [path for stage in ("shard", "preprocess") for path in (serving.workspace / stage).glob("*/artifact.json")]
    return [str(path.parent.relative_to(serving.workspace)) for path in found]


def test_cancelled(serving: Serving, seen: Seen) -> None:
    serving.wish("train", "hang")
    run = seen.start("finetune-llama2/demo", run_name="cancelled", overrides=["train.lr=3e-4"])
    stage = serving.wait_until_hangs("train")
    seen.client.set_flow_run_state(run.id, Cancelling())
    seen.wait_for(run.id, "Cancelled")
    assert not lives(stage)
    record = serving.record("cancelled")
    assert (record.state, record.nodes["train"].state) == ("stopped", "stopped")
    wait_until(lambda: seen.unfinished(run.id) == [])
    (serving.workspace / "train.hangs").unlink()


def test_the_process_of_a_run_is_killed(serving: Serving, seen: Seen) -> None:
    serving.wish("train", "hang")
    run = seen.start("finetune-llama2/demo", run_name="killed", overrides=["train.lr=4e-4"])
    stage = serving.wait_until_hangs("train")
    wait_until(lambda: "## train, 50%" in seen.pages(run.id).get("train", ""))
    os.kill(serving.record("killed").pid, signal.SIGKILL)
    seen.wait_for(run.id, "Crashed")
    wait_until(lambda: not lives(stage))
    wait_until(lambda: seen.unfinished(run.id) == [])
    wait_until(lambda: serving.record("killed").finished is not None)
    assert serving.record("killed").nodes["train"].state == "stopped"
    wait_until(lambda: "## killed: crashed" in seen.pages(run.id).get("summary", ""))
    assert seen.pages(run.id)["train"].startswith("## train was stopped")
    (serving.workspace / "train.hangs").unlink(missing_ok=True)


def test_runner_and_run_are_killed(tmp_path: Path, server: Server, seen: Seen) -> None:
    """A run goes on without its runner; when it is killed, too, nobody but its watcher is left to say so.

    And what an earlier runner left where even the watcher was killed, as when the machine lost power, is settled at the start.
    """
    earlier = seen.client.create_flow_run(finetune, name="earlier", state=Running())
    folder = RunFolder(tmp_path / "workspace", "earlier")
    folder.path.mkdir(parents=True)
    folder.write(RunRecord(name="earlier", config={}, cwd="/", pid=1, started=now(), flow_run_id=str(earlier.id)))
    runner = Serving(tmp_path, server.api, "left")
    try:
        runner.make(until="verify")
        runner.wish("train", "hang")
        runner.wait_until_said("stop         Ctrl-C")
        assert "earlier  crashed: its process is gone" in runner.said()
        assert seen.state(earlier.id) == "Crashed"
        run = seen.start("finetune-llama2/left", run_name="alone")
        stage = runner.wait_until_hangs("train")
        runner.process.kill()
        runner.process.wait()
        process = runner.record("alone").pid
        assert lives(process)
        assert lives(stage)
        assert seen.state(run.id) == "Running"
        os.kill(process, signal.SIGKILL)
        seen.wait_for(run.id, "Crashed")
        assert seen.message(run.id) == "its process is gone"
        wait_until(lambda: not lives(stage))
        wait_until(lambda: seen.unfinished(run.id) == [])
    finally:
        runner.end()


def test_the_terminal_of_the_runner_is_closed(serving: Serving, seen: Seen) -> None:
    """Runner and run end at once, the stage when it has saved its work. It is the last test of this runner."""
    serving.wish("train", "hang and save")
    run = seen.start("finetune-llama2/demo", run_name="hung-up", overrides=["train.lr=5e-4"])
    stage = serving.wait_until_hangs("train")
    process = serving.record("hung-up").pid
    os.killpg(serving.process.pid, signal.SIGHUP)  # as a terminal does: to all that it started
    assert serving.process.wait(timeout=60) == -signal.SIGHUP
    wait_until((serving.workspace / "train.saves").exists)
    assert not lives(process)
    assert lives(stage)
    serving.wish("train", "")
    wait_until(lambda: not lives(stage))
    assert (serving.workspace / "train.saved").exists()
    seen.wait_for(run.id, "Crashed")
    wait_until(lambda: seen.unfinished(run.id) == [])
    wait_until(lambda: serving.record("hung-up").finished is not None)
    record = serving.record("hung-up")
    assert (record.state, record.nodes["train"].state) == ("crashed", "stopped")


def test_the_runner_is_asked_to_stop_and_once_more(tmp_path: Path, server: Server, seen: Seen) -> None:
    """First it waits for what goes on, which ends well. Then it stops that, which saves its work first, however often it is
    asked. And the UI takes any text for a name.
    """
    runner = Serving(tmp_path, server.api, "twice")
    try:
        runner.make(until="verify")
        runner.wish("train", "hang")
        runner.wait_until_said("stop         Ctrl-C")
        first = seen.start("finetune-llama2/twice", run_name="slow")
        runner.wait_until_hangs("train")
        run = seen.client.create_flow_run_from_deployment(
            seen.client.read_deployment_by_name("finetune-llama2/twice").id,
            name="../../My 2nd try", parameters={"overrides": ["train.lr=6e-4"]},
        )  # fmt: skip
        wait_until(lambda: len(runner.flow_processes()) == 2)
        [folder] = [folder for folder in (runner.workspace / "runs").iterdir() if folder.name != "slow"]
        assert seen.client.read_flow_run(run.id).name == folder.name
        wait_until(lambda: (runner.record(folder.name).nodes["train"].doing or "").startswith("waiting for its turn"))
        os.killpg(runner.process.pid, signal.SIGINT)  # as a terminal does: to all that it started
        runner.wait_until_said("takes no more runs, and waits for the 2 runs that go on")
        runner.wish("train", "hang and save")  # which only the second begins with
        seen.wait_for(first.id, "Completed")
        runner.wait_until_said("slow  Completed")
        assert runner.record("slow").state == "done"

        stage = runner.wait_until_hangs("train")
        runner.process.send_signal(signal.SIGTERM)
        wait_until((runner.workspace / "train.saves").exists)
        process = runner.record(folder.name).pid
        os.kill(process, signal.SIGTERM)  # as from a runner that is told twice, or from a person
        seen.client.set_flow_run_state(run.id, Cancelling())  # once more, in the UI
        wait_until(lambda: not is_pending(process, signal.SIGTERM))
        assert lives(process)
        assert lives(stage)
        runner.wish("train", "")
        assert runner.process.wait(timeout=90) == 0
        assert "stops the run that goes on; trainings save a checkpoint first" in runner.said()
        assert (runner.workspace / "train.saved").exists()
        assert seen.state(run.id) == "Cancelled"
        assert seen.unfinished(run.id) == []
        record = runner.record(folder.name)
        assert (record.state, record.nodes["train"].state) == ("stopped", "stopped")
        assert "Traceback" not in runner.said()
    finally:
        runner.end()


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has not yet been told of a signal that was sent to it."""
    [shared] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:")]
    return bool(int(shared.split()[1], 16) & 1 << (number - 1))
