"""The `finetune` command as a process, with stand-in stages that are processes too."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_stages import config, make_results
from processes import lives, wait_until
from runners import CONFIG, ROOT, Place

from flows import cli
from flows.asked.load_config import load_config
from flows.commands import run
from flows.commands.run import exit_code
from flows.launch.protocol import Reason, StageFailed
from flows.records.go_on import go_on, other_failures
from flows.records.run_record import NodeRecord, RunFolder, RunRecord, all_runs, now
from flows.server import local as servers
from flows.server.local import Server


class Command(Place):
    """Runs `finetune` in a folder with `mine.yaml`."""

    def __init__(self, folder: Path, server: Server) -> None:
        super().__init__(folder, "mine", server.api)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.started.append(self.finetune(*arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return self.started[-1]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err

    def newest(self) -> RunRecord:
        """Of the runs."""
        return all_runs(self.workspace)[0]


@pytest.fixture
def finetune(tmp_path: Path, server: Server) -> Iterator[Command]:
    command = Command(tmp_path, server)
    yield command
    for process in command.started:
        process.kill()
        process.communicate()


@pytest.fixture
def told(
    finetune: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which is enough where it starts no run: exit code, and what it printed."""
    monkeypatch.chdir(finetune.folder)

    def told(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return told


def damage(file: Path) -> None:
    """Change a byte as a bad disk does: size and time stay."""
    stat = file.stat()
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def ran(record: RunRecord) -> list[str]:
    return [node for node, state in record.nodes.items() if state.state == "ran"]


def test_run_status_and_rerun(finetune: Command, told: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = finetune("run", "mine.yaml", "--name", "brisk-otter")
    assert (code, err) == (0, "")
    assert out.startswith("finetune-llama2 · run brisk-otter · http://127.0.0.1:")
    assert "\x1b" not in out
    assert "held-out loss 8.32 → 3.11 · perplexity 4,105 → 22.4" in out
    assert "before   def read(??\nafter    def read(self, size=-1):" in out
    assert 'from_pretrained("workspace/runs/brisk-otter/export/model")' in out
    everything = [p for p in finetune.workspace.rglob("*") if p.is_file()]
    assert [p for p in everything if b"a-secret-token" in p.read_bytes()] == []
    logs = finetune.workspace / "runs" / "brisk-otter" / "logs"
    assert "this is download-model, token [hidden]" in (logs / "download-model.log").read_text()
    assert "this is train, token unset" in (logs / "train.log").read_text()
    prefect = (logs / "prefect.log").read_text()
    assert "this is train" in prefect
    assert "hook" not in prefect.lower()

    made = finetune.newest().nodes["train"]
    assert made.path is not None
    left = finetune.workspace / "train" / f".{made.key}.partial" / "of-an-interrupted-training"
    left.parent.mkdir()
    left.touch()
    code, out, err = finetune("rerun", "brisk-otter", "--stage", "train", "--fresh")
    assert (code, err, ran(finetune.newest())) == (0, "", ["train", "merge", "export", "push"])
    assert not (finetune.workspace / made.path / left.name).exists()  # where a training that goes on would have it

    again = ["run", "mine.yaml", "--name", "from", "--set", "train.lr=0.5"]  # which is another training
    code, out, err = finetune(*again, "--from", "brisk-otter/train")
    assert (code, err, finetune.newest().name, ran(finetune.newest())) == (0, "", "from", [])
    assert finetune.newest().nodes["train"].path == made.path
    code, _, err = told(*again, "--from", "nonsense")
    assert (code, err.startswith("error: --from nonsense: no result is there. Name the folder of one, such as ")) == (2, True)
    code, _, err = told("rerun", "brisk-otter", "--fresh")
    assert (code, err) == (2, "error: --fresh says how to do a stage again: name it, e.g. --stage train --fresh\n")

    code, out, _ = told("status")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["from", "brisk-otter"]
    assert " done " in out
    code, out, _ = told("status", "brisk-otter")
    assert "workspace/train/" in out
    assert out.startswith("finetune-llama2 · run brisk-otter · http://127.0.0.1:")  # a server answers there
    code, _, err = told("rerun", "brisk-otter", "--stage", "trian")
    assert (code, err.startswith("error: there is no stage trian. Legal here: ")) == (2, True)
    code, _, err = told("rerun", "calm-heron")
    assert (code, err.startswith("error: there is no run calm-heron in ")) == (2, True)


def test_a_stage_that_fails(finetune: Command) -> None:
    finetune.wish("convert", "fail")
    code, out, err = finetune("run", "mine.yaml", "--name", "calm-heron")
    assert (code, err.splitlines()) == (
        1,
        [
            "error: convert: RuntimeError: a defect. This is a defect of ours; its log has the traceback",
            "       Log: workspace/runs/calm-heron/logs/convert.log",
            "       Report: workspace/runs/calm-heron/report.html",
            "       Go on: finetune rerun calm-heron",
        ],
    )
    assert "convert         ✗" in out
    assert finetune.newest().nodes["preprocess"].state == "ran"  # what did not depend on it was finished
    log = (finetune.workspace / "runs" / "calm-heron" / "logs" / "convert.log").read_text()
    assert "Traceback (most recent call last)" in log


def test_a_damaged_input_and_the_hint_that_mends_it(finetune: Command, told: Callable[..., tuple[int, str, str]]) -> None:
    workspace = finetune.folder / "my workspace"
    made = make_results(load_config(finetune.folder / "mine.yaml", [f"workspace={workspace}"]), until="convert")
    damage(made["convert"].folder(workspace) / "content.txt")
    code, out, err = finetune("run", "mine.yaml", "--name", "calm-heron", "--workspace", "my workspace")
    assert (code, "its digest is not the one its artifact records" in err) == (2, True)
    hint = f"finetune rerun calm-heron --workspace '{workspace}' --stage convert"
    assert err.endswith(f"       Go on: {hint}\n")
    [line] = [line for line in out.splitlines() if line.startswith("  shard ")]
    assert line.endswith(" …")
    assert len(line) < 140

    _, out, _ = told("status", "--workspace", "my workspace")
    assert out.endswith(f" … · {hint}\n")
    _, out, _ = told("status", "calm-heron", "--workspace", "my workspace")
    assert f"Go on:      {hint}\n" in out
    code, _, err = finetune(*shlex.split(hint)[1:])
    assert (code, err) == (0, "")
    assert ran(all_runs(workspace)[0])[:2] == ["convert", "shard"]


def test_a_finished_training_is_not_done_again_for_a_damaged_input(tmp_path: Path) -> None:
    made = make_results(config(tmp_path))
    told = "inputs.model: /x: missing. Remove /y and run again, or: finetune rerun RUN --stage download"
    record = RunRecord(name="calm-heron", config={}, cwd="/", pid=1, started=now(), state="failed")
    record.nodes["download-model"].path = made["download-model"].path
    record.nodes["export"] = NodeRecord(state="failed", error=told)
    command = "finetune rerun calm-heron --workspace ws"
    assert go_on(tmp_path, record, " --workspace ws") == f"rm -r {tmp_path / made['download-model'].path} && {command}"
    record.nodes["export"].error = told.replace("inputs.model", "inputs.weights")
    assert go_on(tmp_path, record, " --workspace ws") == f"{command} --stage merge"
    record.nodes["export"].error = "inputs.model: vocab_size=3 of the data exceeds 2"
    assert go_on(tmp_path, record, " --workspace ws") == command
    assert other_failures(record) == ["export: inputs.model: vocab_size=3 of the data exceeds 2"]


def test_a_workspace_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["status"], ["status", "calm-heron"], ["rerun", "calm-heron"]):
        assert cli.main(arguments) == 2
        told = f"error: there is no workspace {tmp_path}/workspace; name the one of the configuration: --workspace FOLDER\n"
        assert capsys.readouterr().err == told


@pytest.mark.parametrize("arguments", [["status"], ["plan", str(ROOT / "configs" / "demo.yaml")], ["rerun", "a"], ["ui"]])
def test_a_workspace_that_cannot_be_a_folder_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--workspace", "~nobodyx/w"])
    assert ended.value.code == 2
    assert "error: argument --workspace: '~nobodyx/w' cannot be a folder (Could not " in capsys.readouterr().err


def test_a_page_whose_server_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path, "calm-heron")
    folder.path.mkdir(parents=True)
    page = "http://127.0.0.1:9/runs/flow-run/1"
    record = RunRecord(name="calm-heron", config={}, cwd="/", pid=1, started=now(), state="done", page=page, flow_run_id="1")
    folder.write(record)
    assert cli.main(["status", "calm-heron", "--workspace", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert page not in out
    option = f"--workspace {tmp_path} --keep-server"
    assert f"UI:         its server ended with the run; finetune rerun calm-heron {option} leaves it on\n" in out
    folder.write(record.model_copy(update={"page": "https://prefect.example/runs/1"}))  # does not end with a run
    assert cli.main(["status", "calm-heron", "--workspace", str(tmp_path)]) == 0
    assert "https://prefect.example/runs/1\n" in capsys.readouterr().out


def test_a_terminal_without_the_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, "calm-heron")
    folder.path.mkdir(parents=True)
    folder.write(RunRecord(name="calm-heron", config={}, cwd="/", pid=1, started=now(), state="done"))
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    assert cli.main(["status", "calm-heron", "--workspace", str(tmp_path)]) == 0
    assert out.getvalue().startswith(b"finetune-llama2 ? run calm-heron\ndone ? started ")


def test_a_run_of_a_version_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # as rerun does itself, for good
    folder = RunFolder(tmp_path, "calm-heron")
    folder.path.mkdir(parents=True)
    asked = config(tmp_path).model_dump(mode="json")
    asked["train"]["optimiser"] = "sgd"
    folder.write(RunRecord(name="calm-heron", config=asked, cwd=str(tmp_path), pid=1, started=now(), state="done"))
    assert cli.main(["rerun", "calm-heron", "--workspace", str(tmp_path)]) == 2
    told = "error: run calm-heron: train.optimiser: unknown key. Did you mean train.optimizer?\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("reason", "code"), [("crash", 1), ("killed", 1), ("interrupted", 1), ("bad input", 2), ("gate failed", 3)]
)
def test_exit_codes(reason: Reason, code: int) -> None:
    assert exit_code(StageFailed("verify", reason, "", log_file=Path("log"), code=9)) == code


def test_a_wrong_configuration_starts_nothing(finetune: Command, told: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = told("run", "mine.yaml", "--set", "train.optimiser=x")
    assert (code, out) == (2, "")
    assert err == "error: --set train.optimiser=x: unknown key. Did you mean train.optimizer?\n"
    assert not (finetune.workspace / "runs").exists()
    code, _, err = told("run", "nothing.yaml")
    assert (code, err) == (2, "error: nothing.yaml: no such file\n")
    code, _, err = told("serve", "nothing.yaml")
    assert (code, err) == (2, "error: nothing.yaml: no such file\n")
    assert not (finetune.workspace / "prefect" / "runner.lock").exists()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: object) -> None:
        raise servers.NoServer("the local Prefect server ended: database or disk is full")

    (tmp_path / "mine.yaml").write_text(CONFIG)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "_start", fail)
    arguments = ["run", str(tmp_path / "mine.yaml"), "--workspace", str(tmp_path / "ws")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "error: the local Prefect server ended: database or disk is full\n"
    monkeypatch.setattr(run, "NO_SPACE", 1 << 62)
    assert cli.main(arguments) == 2
    assert re.fullmatch(r"error: .*/ws: no space left \(.* free\): make room\n", capsys.readouterr().err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_is_graceful(finetune: Command, number: int, code: int) -> None:
    finetune.make(until="download-model")
    finetune.wish("download-data", "hang")
    process = finetune.start("run", "mine.yaml", "--name", "calm-heron")
    wait_until((finetune.workspace / "download-data.hangs").exists)
    stage = int((finetune.workspace / "download-data.pid").read_text())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Go on: finetune rerun calm-heron" in err
    assert "Traceback" not in err
    assert not lives(stage)
    record = finetune.newest()
    assert (record.state, record.nodes["download-data"].state) == ("stopped", "stopped")
    assert "stopped by SIGTERM" in (record.nodes["download-data"].error or "")


def test_kill_9(finetune: Command, told: Callable[..., tuple[int, str, str]]) -> None:
    """What is told of a run that goes on, and of one that is gone; that the hint's command goes on is in test_end_to_end."""
    finetune.make(until="verify")
    finetune.wish("train", "hang")
    process = finetune.start("run", "mine.yaml", "--name", "first")
    wait_until((finetune.workspace / "train.hangs").exists)
    stage = int((finetune.workspace / "train.pid").read_text())
    busy, _, err = told("rerun", "first")
    assert (busy, err) == (2, "error: run first is going on in another process; see: finetune status first\n")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not lives(stage))
    wait_until(lambda: finetune.newest().finished is not None)  # its watcher marks it
    crashed = finetune.newest()
    assert (crashed.state, crashed.nodes["train"].state) == ("crashed", "stopped")
    _, out, _ = told("status")
    assert "its process is gone · finetune rerun first" in out


def test_the_same_work_is_waited_for_and_trainings_take_turns(
    finetune: Command, told: Callable[..., tuple[int, str, str]]
) -> None:
    finetune.make(until="push")
    shutil.rmtree(finetune.workspace / "train")
    finetune.wish("train", "hang")
    first = finetune.start("run", "mine.yaml", "--name", "first")
    wait_until((finetune.workspace / "train.hangs").exists)
    same = finetune.start("run", "mine.yaml", "--name", "same")
    other = finetune.start("run", "mine.yaml", "--name", "other", "--set", "train.lr=0.5")

    def doing(run: str) -> str:
        record = RunFolder(finetune.workspace, run).read()  # None: it has not begun
        return (record.nodes["train"].doing or "") if record is not None else ""

    wait_until(lambda: doing("same") == "waiting: run first is making this result")
    turn = f"waiting for its turn: run first of {finetune.workspace} has it"
    wait_until(lambda: doing("other") == turn)
    _, out, _ = told("status")
    assert f"  train           {turn}" in out
    third = finetune.start("run", "mine.yaml", "--name", "third", "--set", "train.lr=0.5")
    wait_until(lambda: doing("third") == turn)  # of the same key as `other`, which has not begun either
    third.send_signal(signal.SIGINT)
    _, err = third.communicate(timeout=60)
    assert (third.returncode, "Traceback" in err) == (130, False)
    assert finetune.record("third").state == "stopped"

    finetune.wish("train", "")
    for process in (first, same, other):
        process.communicate(timeout=90)
        assert process.returncode == 0
    states = {name: finetune.record(name).nodes["train"].state for name in ("first", "same", "other")}
    assert states == {"first": "ran", "same": "cached", "other": "ran"}
    log = (finetune.workspace / "runs" / "other" / "logs" / "prefect.log").read_text()
    assert turn in log


AWAY = """
import sys
import flows.finetune
from flows import cli
from flows.records.run_record import LiveRecord, RunFolder, RunRecord, now

def finetune(config, run_name, **asked):
    record = RunRecord(name=run_name, config={}, cwd="/", pid=1, started=now(), finished=now(), state="done")
    LiveRecord(RunFolder(config.workspace_path, run_name), record)
    raise ConnectionError("refused")

flows.finetune.finetune = finetune
sys.exit(cli.main(["run", "mine.yaml"]))
"""


def test_a_server_that_is_away_when_the_run_ends(finetune: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AWAY], cwd=finetune.folder, env=finetune.environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == "the Prefect server was away when the run ended (ConnectionError); the next run tells its page\n"
    assert "Logs:       workspace/runs/" in done.stdout
