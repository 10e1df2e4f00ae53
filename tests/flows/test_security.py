"""What docs/security.md promises and a test can see: where the Hub's token is, and where it is not."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until

from flows.commands.outcome import say_errors
from flows.server.local import Server

PAGE = 200  # the most that Prefect's API hands out at once
TOKEN = "not-a-token-of-anybody-4711"
CONFIG = """
model: {source: somebody/model}
data: {source: somebody/data}
train: {steps: 2, sequence_length: 16}
push: {to: hub, repo: me/mine}
"""


@pytest.fixture
def running(tmp_path: Path, server: Server) -> Iterator[subprocess.Popen[str]]:
    """`finetune run` whose training hangs, and then its push."""
    (tmp_path / "workspace" / "fake").mkdir(parents=True)
    (tmp_path / "workspace" / "fake" / "train").write_text("hang")
    (tmp_path / "workspace" / "fake" / "push").write_text("hang")
    (tmp_path / "mine.yaml").write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_finetune.py")), "run", "mine.yaml", "--name", "brisk-otter"],
        cwd=tmp_path, env={**os.environ, "HF_TOKEN": TOKEN, "PREFECT_API_URL": server.api}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def environment_of(workspace: Path, node: str) -> bytes:
    """What the process of a stage that hangs was given."""
    hangs = workspace / f"{node}.hangs"
    wait_until(lambda: hangs.exists() and hangs.read_text() != "", seconds=200)
    return Path(f"/proc/{hangs.read_text()}/environ").read_bytes()


def told_by(server: Server, kind: str) -> list[Any]:
    """Everything that the server's API has of a kind; of events, the newest."""
    rows: list[Any] = []
    while True:
        page = b"{}" if kind == "events" else json.dumps({"limit": PAGE, "offset": len(rows)}).encode()
        asked = urllib.request.Request(f"{server.api}/{kind}/filter", data=page, headers={"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as response:
            told = json.loads(response.read())
        rows += told["events"] if kind == "events" else told
        if kind == "events" or len(told) < PAGE:
            return rows


def test_a_token_is_with_whom_it_is_for_and_nowhere_else(
    tmp_path: Path, server: Server, running: subprocess.Popen[str]
) -> None:
    workspace = tmp_path / "workspace"
    assert TOKEN.encode() not in environment_of(workspace, "train"), "training has no use for it"
    (workspace / "fake" / "train").write_text("")
    assert TOKEN.encode() in environment_of(workspace, "push")
    command_lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command_lines.append(file.read_bytes())
    assert [line for line in command_lines if TOKEN.encode() in line] == []

    (workspace / "fake" / "push").write_text("leak")
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1
    assert "error: push: RuntimeError: https://me:[hidden]@hub refuses." in err
    assert TOKEN not in out + err

    told = {kind: told_by(server, kind) for kind in ("flow_runs", "task_runs", "logs", "artifacts", "events")}
    assert "[hidden]" in str(told["logs"]), "the API was asked for this run"
    assert [kind for kind, rows in told.items() if TOKEN in str(rows) or not rows] == []
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
