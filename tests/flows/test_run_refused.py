"""`finetune run` and `rerun` where something is in the way that nothing could tell before: words, and no traceback."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config

from flows import cli
from flows.commands import run
from flows.launch import choose
from flows.records.run_record import RunFolder, RunIsLive, RunRecord, now


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was stopped, of a configuration that can be run."""
    monkeypatch.setattr(run, "refuse_what_cannot_run", lambda *asked: None)
    monkeypatch.setattr("flows.running.quiet.logs_to_file", lambda file: None)  # of this process, for good
    folder = RunFolder(tmp_path / "ws", "calm-heron")
    folder.path.mkdir(parents=True)
    asked = config(tmp_path / "ws").model_dump(mode="json")
    folder.write(RunRecord(name="calm-heron", config=asked, cwd=str(tmp_path), pid=1, started=now(), state="stopped"))
    return folder


@pytest.mark.parametrize("number", [errno.EPERM, errno.EROFS])  # another person's folder; a small disk that is read-only
def test_a_server_whose_folder_cannot_be_used(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(run, "NO_SPACE", 1 << 62)
    monkeypatch.chdir(folder.workspace)
    monkeypatch.setattr(
        choose, "decided", lambda settings: (settings, "stages run as plain processes of this machine: no luck")
    )
    assert cli.main(["rerun", "calm-heron", "--workspace", str(folder.workspace)]) == 2
    told = f"error: workspace: {folder.workspace} cannot be used: [Errno {number}] {os.strerror(number)}: "
    assert (
        capsys.readouterr().err
        == f"stages run as plain processes of this machine: no luck\n{told}'{folder.workspace}/prefect'\n"
    )


def test_a_server_that_is_not_there_leaves_no_folder_of_the_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(run.Wrong, match="no Prefect server answers"):
        run._do(config(folder.workspace), "new-name", "", keep_server=False)
    assert not (folder.workspace / "runs" / "new-name").exists()


def test_a_run_that_another_process_began_meanwhile(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun_elsewhere(**asked: Any) -> None:
        raise RunIsLive("run calm-heron is going on in another process")

    monkeypatch.setattr("flows.finetune.finetune", begun_elsewhere)
    monkeypatch.setattr("flows.running.settle.reconcile", lambda workspaces: [])
    with pytest.raises(
        run.Wrong, match=r"^run calm-heron is going on in another process; see: finetune status calm-heron --workspace x$"
    ):
        run._run_flow(config(folder.workspace), folder, " --workspace x", {})
    assert capsys.readouterr().err == ""


def test_what_a_traceback_quotes_cannot_steer_a_terminal(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**asked: Any) -> None:
        raise ZeroDivisionError("\x1b]0;owned\x07")

    monkeypatch.setattr("flows.finetune.finetune", fail)
    monkeypatch.setattr("flows.running.settle.reconcile", lambda workspaces: [])
    assert run._run_flow(config(folder.workspace), folder, "", {}) == 1
    err = capsys.readouterr().err
    assert "This is a defect of ours" in err
    assert "Traceback" in err
    assert "\x1b" not in err


def test_a_record_that_cannot_be_read(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "run.json").write_text("{}")
    assert cli.main(["status", "calm-heron", "--workspace", str(folder.workspace)]) == 2
    told = f"error: {folder.path}/run.json cannot be read: it is of another version of megatron-flows, or damaged\n"
    assert capsys.readouterr().err == told
