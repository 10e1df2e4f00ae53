"""What docs/security.md promises and a test can see: where the Hub's token is, and where it is not."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runners import Place
from traces import home_of, in_command_lines, in_files, told_by

from flows.commands.outcome import say_errors
from flows.server.local import Server

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


def test_a_token_is_with_whom_it_is_for_and_nowhere_else(place: Place, server: Server, running: subprocess.Popen[str]) -> None:
    assert TOKEN.encode() not in environment_of(place, "train"), "training has no use for it"
    place.wish("train", "")
    assert TOKEN.encode() in environment_of(place, "push")
    assert in_command_lines(TOKEN) == []

    place.wish("push", "leak")
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1
    assert "error: push: RuntimeError: https://me:[hidden]@hub refuses." in err
    assert TOKEN not in out + err

    told = told_by(server.api)
    assert "[hidden]" in str(told["logs"]), "the API was asked for this run"
    assert [kind for kind, rows in told.items() if TOKEN in str(rows) or not rows] == []
    assert in_files(TOKEN, place.workspace, home_of(server.api)) == []


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_errors(["download: a\x1b]0;owned\x07\x1b[2Jb\r: is no text\n  see above"])
    assert capsys.readouterr().err == "error: download: a ]0;owned  [2Jb : is no text\n  see above\n"
