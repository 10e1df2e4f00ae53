"""Lines, secrets and events in a stage's output."""

import pytest

from flows.launch.environment import container_environment, hub_environment, stage_environment
from flows.launch.listener import LAST_LINES, LONGEST_LAST, explain, last_lines
from flows.launch.output import HIDDEN, LineSplitter, Redactor, parse_event

KILLED = "killed (SIGKILL) from outside: by somebody, or by the kernel, where the machine is out of memory"


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
        (1, None, False, "crash", "ended with exit code 1 and no message of its own. Its last lines: first ⏎ last"),
        (1, "X: y", False, "crash", "X: y"),
        (2, "no", False, "bad input", "no"),
        (3, "no", False, "gate failed", "no"),
        (4, "stopped by SIGTERM", False, "interrupted", "stopped by SIGTERM"),
        (4, None, True, "interrupted", "stopped"),
        (137, None, False, "killed", f"{KILLED}. Its last lines: first ⏎ last"),
        (-9, None, False, "killed", f"{KILLED}. Its last lines: first ⏎ last"),
        (139, None, False, "killed", "killed by SIGSEGV. Its last lines: first ⏎ last"),
        (77, None, False, "crash", "ended with exit code 77 and no message of its own. Its last lines: first ⏎ last"),
    ],
)
def test_exit_codes_in_words(code: int, told: str | None, stopped: bool, reason: str, message: str) -> None:
    assert explain(code, told, ["first", "last", ""], stopped=stopped) == (reason, message)


def test_a_stage_s_environment_is_an_allow_list() -> None:
    ours = {
        "HF_TOKEN": "secret", "HF_ENDPOINT": "http://x", "HTTPS_PROXY": "http://me:pw@x", "PREFECT_API_URL": "x",
        "AWS_SECRET": "x", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    alone = stage_environment(ours, talks_to_hub=False)
    assert set(alone) == {"PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "OMP_NUM_THREADS", "PYTHONPATH", "STAGE_EVENTS",
                          "PYTHONUNBUFFERED"}  # fmt: skip
    assert set(stage_environment(ours, talks_to_hub=True)) - set(alone) == {"HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY"}


def test_a_container_gets_less_of_it() -> None:
    """Its programs, folders and devices are its own; what is for the Hub goes another way, which nobody sees."""
    ours = {
        "HF_TOKEN": "secret", "HTTPS_PROXY": "http://me:pw@x", "PREFECT_API_URL": "x", "PATH": "/bin", "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/x",
    }  # fmt: skip
    assert set(container_environment(ours)) == {"OMP_NUM_THREADS", "NCCL_DEBUG", "STAGE_EVENTS", "PYTHONUNBUFFERED"}
    assert hub_environment(ours) == {"HF_TOKEN": "secret", "HTTPS_PROXY": "http://me:pw@x"}


def test_last_lines_are_one_line() -> None:
    assert last_lines([]) == "It printed nothing"
    shown = last_lines([f"line {number}" for number in range(10)] + ["x" * 1000, ""])
    assert shown.startswith("Its last lines: line 8 ⏎ line 9 ⏎ xxx")
    assert len(shown) < LAST_LINES * (LONGEST_LAST + 3) + 20
