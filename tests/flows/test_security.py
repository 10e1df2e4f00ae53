"""What docs/security.md promises and a test can see: where the Hub's token is, and where it is not."""

import contextlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runners import Place

from flows.commands.outcome import say_errors
from flows.server.local import Server

PAGE = 200  # the most that Prefect's API hands out at once
TOKEN = "not-a-token-of-anybody-4711"


@pytest.fixture
def place(tmp_path: Path, server: Server) -> Place:
    """Where training is to hang, and then the push."""
    place = Place(tmp_path, "mine", server.api)
    place.environment["HF_TOKEN"] = TOKEN
    place.make(until="verify")
    place.wish("train", "hang")
    place.wish("push", "hang")
    return place


@pytest.fixture
def running(place: Place) -> Iterator[subprocess.Popen[str]]:
    pushes = ("--set", "push={to: hub, repo: me/mine}")
    pipe = subprocess.PIPE
    process = place.finetune("run", "mine.yaml", "--name", "brisk-otter", *pushes, text=True, stdout=pipe, stderr=pipe)
    yield process
    process.kill()
    process.communicate()


def environment_of(place: Place, node: str) -> bytes:
    """What the process of a stage that hangs was given."""
    return Path(f"/proc/{place.wait_until_hangs(node)}/environ").read_bytes()


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


def test_a_token_is_with_whom_it_is_for_and_nowhere_else(place: Place, server: Server, running: subprocess.Popen[str]) -> None:
    assert TOKEN.encode() not in environment_of(place, "train"), "training has no use for it"
    place.wish("train", "")
    assert TOKEN.encode() in environment_of(place, "push")
    command_lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command_lines.append(file.read_bytes())
    assert [line for line in command_lines if TOKEN.encode() in line] == []

    place.wish("push", "leak")
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1
    assert "error: push: RuntimeError: https://me:[hidden]@hub refuses." in err
    assert TOKEN not in out + err

    told = {kind: told_by(server, kind) for kind in ("flow_runs", "task_runs", "logs", "artifacts", "events")}
    assert "[hidden]" in str(told["logs"]), "the API was asked for this run"
    assert [kind for kind, rows in told.items() if TOKEN in str(rows) or not rows] == []
    homes = (place.workspace, home_of(server))
    kept = [file for home in homes for file in home.rglob("*") if file.is_file() and not file.is_symlink()]
    assert [file for file in kept if TOKEN.encode() in file.read_bytes()] == []


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_errors(["download: a\x1b]0;owned\x07\x1b[2Jb\r: is no text\n  see above"])
    assert capsys.readouterr().err == "error: download: a ]0;owned  [2Jb : is no text\n  see above\n"


def home_of(server: Server) -> Path:
    """Where the server keeps its database."""
    with urllib.request.urlopen(f"{server.api}/admin/settings", timeout=30) as response:
        return Path(json.loads(response.read())["home"])
