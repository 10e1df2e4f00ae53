"""Lines, secrets and events in a stage's output."""

import pytest

from flows.launch.output import HIDDEN, LineSplitter, Redactor, parse_event
from flows.launch.process import explain, stage_environment


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_lines_end_with_newlines_and_carriage_returns(piece: int) -> None:
    data = "eins\r\nzwei\n 10%\r 20%\rdüe\n\nend".encode()
    splitter = LineSplitter()
    lines = [line for i in range(0, len(data), piece) for line in splitter.feed(data[i : i + piece])]
    assert [*lines, splitter.end()] == ["eins", "zwei", " 10%", " 20%", "düe", "", "end"]


def test_a_line_without_end_is_cut() -> None:
    splitter = LineSplitter()
    assert len(list(splitter.feed(b"x" * (3 << 20)))) == 1
    assert splitter.end() == ""


def test_secrets_are_hidden() -> None:
    redact = Redactor.of({"HF_TOKEN": "hunter2-secret", "PREFECT_API_AUTH_STRING": "me:password", "PATH": "/usr/bin"})
    assert redact("a hunter2-secret b me:password c /usr/bin") == f"a {HIDDEN} b {HIDDEN} c /usr/bin"
    assert redact("other hf_abcdefghijklmnopqrst!") == f"other {HIDDEN}!"
    assert Redactor.of({"HF_TOKEN": "a"})("banana") == "banana"


def test_events_and_what_only_looks_like_one() -> None:
    assert parse_event('@@stage {"event": "progress", "done": 1}') == {"event": "progress", "done": 1}
    for line in ("@@stage {", "@@stage []", '@@stage {"event": 3}', "@@stage ", '{"event": "x"}', "text"):
        assert parse_event(line) is None


@pytest.mark.parametrize(
    ("code", "told", "stopped", "reason", "message"),
    [
        (1, None, False, "crash", "ended with exit code 1 and no message of its own. Last line: last"),
        (1, "X: y", False, "crash", "X: y"),
        (2, "no", False, "bad input", "no"),
        (3, "no", False, "gate failed", "no"),
        (4, "stopped by SIGTERM", False, "interrupted", "stopped by SIGTERM"),
        (4, None, True, "interrupted", "stopped"),
        (137, None, False, "killed", "killed (SIGKILL) from outside: probably by the kernel, out of memory"),
        (-9, None, False, "killed", "killed (SIGKILL) from outside: probably by the kernel, out of memory"),
        (139, None, False, "killed", "killed by SIGSEGV"),
        (77, None, False, "crash", "ended with exit code 77 and no message of its own. Last line: last"),
    ],
)
def test_exit_codes_in_words(code: int, told: str | None, stopped: bool, reason: str, message: str) -> None:
    assert explain(code, told, ["first", "last", ""], stopped=stopped) == (reason, message)


def test_a_stage_s_environment_is_an_allow_list() -> None:
    ours = {
        "HF_TOKEN": "secret", "HF_ENDPOINT": "http://x", "HTTPS_PROXY": "http://me:pw@x", "PREFECT_API_URL": "x",
        "AWS_SECRET": "x", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    train = stage_environment("train", ours)
    assert set(train) == {"PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "OMP_NUM_THREADS", "PYTHONPATH", "STAGE_EVENTS",
                          "PYTHONUNBUFFERED"}  # fmt: skip
    for stage in ("download", "push"):
        assert set(stage_environment(stage, ours)) - set(train) == {"HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY"}
