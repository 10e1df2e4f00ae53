"""JSON lines to tokens in several processes: every line once, the same result for any cut, and no process left behind."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from distributed import started_children
from tiny_tokenizers import CODE, train_sentencepiece

from megatron_core_impl.data.jsonl import MalformedLine, read_lines, text_of
from megatron_core_impl.data.tokenization import Job, WorkerDied, tokenize_file
from megatron_core_impl.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_ranges_give_each_line_once(tmp_path: Path, size: int, ending: bytes) -> None:
    content = b"one\n\nthree\r\n" + "f\u2028our\n".encode() + b"a much longer line than all the others\nx" + ending
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    lines = [line for start in range(0, len(content), size) for line in read_lines(file, start, start + size)]
    assert lines == content.removesuffix(b"\n").split(b"\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"", "empty line"),
        (b"  \r", "empty line"),
        (b'["text"]', "an array, not an object"),
        (b"null", "null, not an object"),
        (b"3", "a number, not an object"),
        (b'{"id": 1}', 'no key "text"'),
        (b'{"text": null}', '"text" is null, not a string'),
        (b'{"text": true}', '"text" is true or false, not a string'),
        (b'{"text": {"a": 1}}', '"text" is an object, not a string'),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b'{"text": "a\\ud83d"}', r'"text" is no valid Unicode: \ud83d at character 2 is half of a surrogate pair'),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b"[" * 100_000, "not readable JSON: maximum recursion depth exceeded"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable JSON: Exceeds the limit"),
    ],
)
def test_malformed_line_has_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(MalformedLine) as error:
        text_of(line)
    assert str(error.value).startswith(reason)


def test_line_gives_its_text() -> None:
    assert text_of('{"id": 1, "text": "é\\ud83d\\ude00\\u2028", "n": NaN}\r'.encode()) == "é😀\u2028"
    assert text_of(b'{"content": "a"}', key="content") == "a"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and 60 lines: code, empty texts and malformed lines; one line is longer than a chunk."""
    folder = tmp_path_factory.mktemp("tokenization")
    train_sentencepiece(folder)
    lines = [f'{{"text": {text}}}' for text in (*(repr_json(text) for text in CODE), '""')] * 12
    lines[7] = "no json"
    lines[8] = f'{{"text": {repr_json(CODE[0] * 20)}}}'
    lines[41] = "{}"
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def repr_json(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


def job(folder: Path, **changes: object) -> Job:
    settings = {"append_eod": True, "dtype": np.dtype("<u2"), "chunk_bytes": 200, **changes}
    return Job(folder / "data.jsonl", folder, "auto", **settings)  # type: ignore[arg-type]


def outcome(job: Job, workers: int) -> tuple[bytes, list[int], int, list[tuple[int, str]]]:
    """(tokens, sizes, empty, malformed lines by their number in the file)."""
    with closing(tokenize_file(job, workers)) as results:
        chunks = list(results)
    assert [chunk.number for chunk in chunks] == list(range(job.num_chunks))
    before = np.cumsum([0, *(chunk.lines for chunk in chunks)])
    malformed = [(int(b) + n, reason) for b, chunk in zip(before, chunks, strict=False) for n, reason in chunk.malformed]
    tokens = b"".join(chunk.tokens.tobytes() for chunk in chunks)
    return tokens, [n for chunk in chunks for n in chunk.sizes.tolist()], sum(c.empty for c in chunks), malformed


def test_result_depends_on_no_worker_and_no_cut(folder: Path) -> None:
    assert job(folder).num_chunks > 12
    one = outcome(job(folder), workers=1)
    assert one == outcome(job(folder), workers=3)
    assert one == outcome(job(folder, chunk_bytes=1 << 20), workers=3)

    tokens, sizes, empty, malformed = one
    tokenizer = load_tokenizer(folder)
    texts = [text for number, text in enumerate(12 * [*CODE, ""]) if number not in (7, 41)]
    texts[7] = CODE[0] * 20
    documents = [[*tokenizer.encode(text), 2] for text in texts if text]
    assert tokens == np.array([t for ids in documents for t in ids], "<u2").tobytes()
    assert sizes == [len(ids) for ids in documents]
    assert empty == 12
    assert malformed == [(8, "not JSON: Expecting value at column 1"), (42, 'no key "text"')]
    assert not started_children()


def test_end_of_text_is_appended_only_on_demand(folder: Path) -> None:
    with_eod, without = outcome(job(folder), 1), outcome(job(folder, append_eod=False), 1)
    assert [n - 1 for n in with_eod[1]] == without[1]
    assert 2 not in np.frombuffer(without[0], "<u2")


def test_killed_worker_is_an_error_and_the_others_are_ended(folder: Path) -> None:
    results = tokenize_file(job(folder), 2)
    next(results)
    victim = started_children()[0]
    os.kill(victim.pid or 0, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=f"worker process {victim.pid} was killed by SIGKILL"):
        list(results)
    assert not started_children()


def test_workers_leave_the_end_to_their_parent(folder: Path) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; only the parent acts on them."""
    results = tokenize_file(job(folder), 2)
    next(results)
    for child in started_children():
        os.kill(child.pid or 0, signal.SIGINT)
        os.kill(child.pid or 0, signal.SIGTERM)
    assert len(list(results)) == job(folder).num_chunks - 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the parent hears them


def test_defect_in_a_worker_comes_with_its_traceback(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)tokenizing failed in a worker process:.*OverflowError"):
        list(tokenize_file(job(folder, dtype=np.dtype("<i1")), 1))
    assert not started_children()


def test_worker_that_cannot_start_is_an_error(folder: Path, tmp_path: Path) -> None:
    lost = Job(folder / "data.jsonl", tmp_path, "auto", append_eod=True, dtype=np.dtype("<u2"))
    with pytest.raises(WorkerDied, match=r"worker process \d+ ended with exit code 1"):
        list(tokenize_file(lost, 1))


def test_closing_early_ends_the_workers(folder: Path) -> None:
    results = tokenize_file(job(folder), 2)
    next(results)
    assert len(started_children()) == 2
    results.close()
    assert not started_children()


PARENT = """
import sys
from pathlib import Path
import numpy as np
from megatron_core_impl.data.tokenization import Job, tokenize_file

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = tokenize_file(Job(folder / "data.jsonl", folder, "auto", True, np.dtype("<u2"), chunk_bytes=200), 2)
    next(results)
    print("working", flush=True)
    sys.stdin.read()
"""


def test_workers_leave_when_their_parent_is_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == "working\n"
    parent.kill()
    assert parent.stdout.read() == ""  # the end comes only when all who hold the pipe, so every worker, are gone
    parent.wait()
