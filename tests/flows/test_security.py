"""What docs/security.md promises and a test can see: where the Hub's token is, and where it is not."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_until

from flows.commands.outcome import say_errors
from flows.server.local import Server

TOKEN = "not-a-token-of-anybody-4711"
CONFIG = "model: {source: somebody/model}\ndata: {source: somebody/data}\ntrain: {steps: 2, sequence_length: 16}\n"


@pytest.fixture
def running(tmp_path: Path, server: Server) -> Iterator[subprocess.Popen[str]]:
    """`finetune run` whose training hangs, and whose push will tell the token in an error."""
    (tmp_path / "workspace" / "fake").mkdir(parents=True)
    (tmp_path / "workspace" / "fake" / "train").write_text("hang")
    (tmp_path / "workspace" / "fake" / "push").write_text("leak")
    (tmp_path / "mine.yaml").write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_finetune.py")), "run", "mine.yaml", "--name", "brisk-otter"],
        cwd=tmp_path, env={**os.environ, "HF_TOKEN": TOKEN, "PREFECT_API_URL": server.api}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def told_by(server: Server, kind: str) -> str:
    """Everything that the server's API has of a kind."""
    request = urllib.request.Request(f"{server.api}/{kind}/filter", data=b"{}", headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read()).decode()


def test_a_token_is_with_whom_it_is_for_and_nowhere_else(
    tmp_path: Path, server: Server, running: subprocess.Popen[str]
) -> None:
    workspace = tmp_path / "workspace"
    hangs = workspace / "train.hangs"
    wait_until(lambda: hangs.exists() and hangs.read_text() != "", seconds=200)
    command_lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command_lines.append(file.read_bytes())
    assert [line for line in command_lines if TOKEN.encode() in line] == []
    assert TOKEN.encode() not in Path(f"/proc/{hangs.read_text()}/environ").read_bytes(), "training has no use for it"

    (workspace / "fake" / "train").write_text("")
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1
    assert "error: push: RuntimeError: https://me:[hidden]@hub refuses." in err
    assert TOKEN not in out + err

    told = {kind: told_by(server, kind) for kind in ("flow_runs", "task_runs", "logs", "artifacts", "events")}
    assert "[hidden]" in told["logs"], "the API was asked for this run"
    assert [kind for kind, text in told.items() if TOKEN in text or not json.loads(text)] == []
    homes = (workspace, home_of(server))
    kept = [file for home in homes for file in home.rglob("*") if file.is_file() and not file.is_symlink()]
    assert [file for file in kept if TOKEN.encode() in file.read_bytes()] == []


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_errors(["download: a\x1b]0;owned\x07\x1b[2Jb\r: is no text\n  see above"])
    assert capsys.readouterr().err == "error: download: a ]0;owned  [2Jb : is no text\n  see above\n"


def home_of(server: Server) -> Path:
    """Where the server keeps its database."""
    with urllib.request.urlopen(f"{server.api}/admin/settings", timeout=30) as response:
        return Path(json.loads(response.read())["home"])
