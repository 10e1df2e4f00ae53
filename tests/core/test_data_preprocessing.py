"""Files to datasets in several processes: every record once, the same bytes for any cut, resumed work, no process left."""

import errno
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from tiny_tokenizers import CODE, train_huggingface, train_sentencepiece
from workers_of_preprocessing import workers

from megatron_core_impl.data import segments
from megatron_core_impl.data.encoder import Encoded
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.parts import Report
from megatron_core_impl.data.preprocessing import Job, Progress, WorkerDied, join, remove_parts, tokenize
from megatron_core_impl.data.records import Record
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.text_encoder import TextRecipe
from megatron_core_impl.data.text_files import SourceFile
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.data.worker import Ended, PartMaker


def write_json(text: str) -> str:
    return json.dumps({"id": 1, "text": text})


LINES = [write_json(text) for text in (*CODE, "")] * 12
LINES[7], LINES[8], LINES[20], LINES[41] = "no json", write_json(CODE[0] * 20), "  ", "{}"  # line 9 is longer than parts
TEXTS = [CODE[0] * 20 if i == 8 else text for i, text in enumerate([*CODE, ""] * 12) if i not in (7, 20, 41)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and 60 lines, among them empty texts, a blank line and malformed ones, in all forms of file."""
    folder = tmp_path_factory.mktemp("preprocessing")
    train_sentencepiece(folder)
    train_huggingface(folder)
    content = "\n".join(LINES).encode() + b"\n"
    (folder / "data.jsonl").write_bytes(content)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(content[:2000]) + gzip.compress(content[2000:]))  # two members
    (folder / "data.jsonl.zst").write_bytes(zstd.compress(content))
    texts = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(texts, folder / "data.parquet", row_group_size=10)
    return folder


def job(folder: Path, output: Path, *names: str, size: int = 200, **recipe: object) -> Job:
    files = tuple(SourceFile(folder / name, name) for name in names or ("data.jsonl",))
    return Job(files, TextRecipe(folder, **recipe), output / "out", size)  # type: ignore[arg-type]


def make(job: Job, processes: int) -> tuple[list[Progress], Statistics, bytes]:
    """What was told, what was counted, and the bytes of the dataset's files."""
    with closing(tokenize(job, processes)) as results:
        told = list(results)
    statistics = join(job)
    remove_parts(job)
    assert not workers()
    return told, statistics, b"".join(Path(f"{job.prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx"))


def make_here(job: Job, order: Sequence[int] = ()) -> tuple[list[Report], Statistics, bytes]:
    """The same without processes: all parts by one, or part k by the order[k % len]-th of several that take turns."""
    work, reports = job.work, []
    work.folder.mkdir()
    makers = [PartMaker(work) for _ in set(order) or {0}]
    for file in range(len(job.files)):
        for part in itertools.count():
            made = makers[order[part % len(order)] if order else 0].make(file, part)
            if isinstance(made, Ended):
                break
            reports.append(made)
    statistics = join(job)
    remove_parts(job)
    return reports, statistics, b"".join(Path(f"{job.prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx"))


FORMS = ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst", "data.parquet"]


@pytest.mark.parametrize("name", FORMS)
def test_result_depends_on_no_cut_and_no_form(folder: Path, tmp_path: Path, name: str) -> None:
    reports, statistics, content = make_here(job(folder, tmp_path, name))
    assert len(reports) > 3
    for size in (1, 7, 100, 1 << 20):
        assert content == make_here(job(folder, tmp_path, name, size=size))[2], size
    assert content == make_here(job(folder, tmp_path, name, size=100), order=[0, 1, 1, 0, 2])[2]  # a process skips parts
    tokenizer = load_tokenizer(folder)
    documents = [[*tokenizer.encode(text), 2] for text in TEXTS if text]
    data = IndexedDataset(tmp_path / "out")
    assert [data[i].tolist() for i in range(len(data))] == documents
    assert data.doc_idx.tolist() == list(range(len(documents) + 1))
    is_parquet = name == "data.parquet"
    assert (statistics.documents, statistics.tokens) == (len(documents), sum(map(len, documents)))
    assert (statistics.empty, statistics.malformed, statistics.blank) == ((12, 0, 0) if is_parquet else (12, 2, 1))
    assert statistics.rows == (57 if is_parquet else 60)
    assert statistics.longest == max(map(len, documents))
    sizes = [len(ids) for ids in documents]
    counts = {str(2**k): sum(2**k <= size < 2 ** (k + 1) for size in sizes) for k in range(20)}
    assert statistics.histogram() == {n: count for n, count in counts.items() if count}


def test_several_processes_write_one_text(folder: Path, tmp_path: Path) -> None:
    names = ("data.parquet", "data.jsonl.gz", "data.jsonl")
    told, statistics, content = make(job(folder, tmp_path, *names), 3)
    assert content == make_here(job(folder, tmp_path, *names))[2]
    data = IndexedDataset(tmp_path / "out")
    third = [data[i].tolist() for i in range(len(data) // 3)]
    assert [data[i].tolist() for i in range(len(data))] == third * 3
    assert statistics.rows == 177
    assert [(progress.report.file, *line) for progress in told for line in progress.malformed] == [
        (number, *line)
        for number in (1, 2)
        for line in ((8, "not JSON: Expecting value at column 1"), (42, 'no key "text"; it has: none'))
    ]
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_what_begins_and_ends_a_document(folder: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(folder, kind)
    bos, eos = tokenizer.bos_id, tokenizer.eod_id
    for policy, before, after in (("none", [], []), ("eos", [], [eos]), ("both", [bos], [eos])):
        make_here(job(folder, tmp_path, kind=kind, bos_eos=policy))
        data = IndexedDataset(tmp_path / "out")
        texts = [text for text in TEXTS if text]
        assert [data[i].tolist() for i in range(len(data))] == [[*before, *tokenizer.encode(t), *after] for t in texts]


def test_interrupted_work_goes_on_from_finished_parts(folder: Path, tmp_path: Path) -> None:
    work = job(folder, tmp_path, "data.jsonl.gz")
    expected = make_here(work)[2]
    results = tokenize(work, 1)
    for _ in range(9):
        next(results)
    results.close()
    parts = work.work.folder
    made = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.tokens")}
    assert len(list(parts.glob("*.json"))) >= 9
    lost = parts / "0000000-0000002.tokens"
    lost.write_bytes(bytes(lost.stat().st_size))  # a machine that lost power
    told = list(tokenize(work, 2))
    assert [progress.is_new for progress in told[:9]] == [False, False, True, *[False] * 6]
    assert told[-1].is_new
    kept = [f"0000000-{part:07}.tokens" for part in (0, 1, 3, 4, 5, 6, 7, 8)]
    assert all((parts / name).stat().st_mtime_ns == made[name] for name in kept)
    join(work)
    assert b"".join((tmp_path / f"out.{suffix}").read_bytes() for suffix in ("bin", "idx")) == expected


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"file": 0}'])
def test_part_whose_report_is_damaged_is_made_again(folder: Path, tmp_path: Path, damaged: str) -> None:
    work = job(folder, tmp_path, size=2000)
    expected = [progress.is_new for progress in tokenize(work, 1)]
    report = work.work.folder / "0000000-0000001.json"
    report.write_text(damaged)
    checked: list[tuple[int, int]] = []
    assert [p.is_new for p in tokenize(work, 1, lambda *done: checked.append(done))] == [i == 1 for i in range(len(expected))]
    assert checked == [(i + 1, len(expected)) for i in range(len(expected))]
    assert json.loads(report.read_text())["part"] == 1


def test_error_of_the_system_in_a_worker_is_what_it_is(folder: Path, tmp_path: Path) -> None:
    work = job(folder, tmp_path)
    work.work.folder.mkdir()
    (work.work.folder / "0000000-0000001.tokens").symlink_to("/dev/full")  # a disk without room
    with pytest.raises(OSError, match="No space left on device") as error:
        list(tokenize(work, 1))
    assert error.value.errno == errno.ENOSPC
    assert not workers()
    (work.work.folder / "0000000-0000001.tokens").unlink()
    told, _, content = make(work, 1)
    assert not told[0].is_new
    assert content == make_here(job(folder, tmp_path))[2]


def test_long_text_takes_memory_of_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of all segments would take some thirty times as much."""
    text = CODE[0] * (500_000 // len(CODE[0]))
    at_once, _ = load_tokenizer(folder).encode_flat([text])
    monkeypatch.setattr(segments, "AT_ONCE", 1000)
    tokenizer = load_tokenizer(folder)
    tokenizer.encode_flat([CODE[0]])
    tracemalloc.start()
    tokens, sizes = tokenizer.encode_flat([text, CODE[0]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens[: sizes[0]].tolist() == at_once.tolist()
    assert peak < 10 * len(text)


def test_parts_of_other_settings_are_not_taken(folder: Path, tmp_path: Path) -> None:
    work = job(folder, tmp_path)
    work.work.folder.mkdir()
    other = replace(work, recipe=replace(work.recipe, bos_eos="none"))  # type: ignore[type-var]
    assert all(progress.is_new for progress in tokenize(other, 1))
    assert not work.work.folder.exists()  # nor kept
    assert not any(progress.is_new for progress in tokenize(other, 1))  # its own are, without a process
    stat, before = (folder / "data.jsonl").stat(), other.work.folder
    os.utime(folder / "data.jsonl", ns=(0, 0))
    assert other.work.folder != before  # the text may have changed
    os.utime(folder / "data.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_killed_worker_is_an_error_and_the_others_are_ended(folder: Path, tmp_path: Path) -> None:
    results = tokenize(job(folder, tmp_path, size=50), 2)  # more parts than may be under way: not all are made yet
    next(results)
    victim = workers()[0]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=f"worker process {victim} was killed by SIGKILL"):
        list(results)
    assert not workers()


def test_workers_leave_the_end_to_their_parent(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; only the parent acts on them."""
    results = tokenize(job(folder, tmp_path), 2)
    next(results)
    for child in workers():
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
    assert list(results)[-1].share == 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the parent hears them


@dataclass(frozen=True)
class Defective:
    """A recipe whose ids do not fit their type, or that cannot be made at all."""

    is_made: bool

    def encoder(self) -> "Defective":
        assert self.is_made, "not today"
        return self

    dtypes = {"-text": np.dtype("<u2")}
    ends_documents = False
    columns = required = ()

    def encode(self, records: Sequence[Record]) -> Encoded:
        return Encoded({"-text": np.array([65536])}, np.array([1]))


def test_defect_in_a_worker_comes_with_its_traceback(folder: Path, tmp_path: Path) -> None:
    work = job(folder, tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)tokenizing failed in a worker.*token ids 65,536 to 65,536 do not fit uint16"):
        list(tokenize(replace(work, recipe=Defective(is_made=True)), 1))
    with pytest.raises(WorkerDied, match=r"worker process \d+ ended with exit code 1"):
        list(tokenize(replace(work, recipe=Defective(is_made=False)), 1))
    assert not workers()


def test_workers_load_nothing_large() -> None:
    code = (
        "import sys, megatron_core_impl.data.worker, megatron_core_impl.data.text_encoder; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "[]\n"


PARENT = """
import sys
from pathlib import Path
from megatron_core_impl.data.parts import Report
from megatron_core_impl.data.preprocessing import Job, tokenize
from megatron_core_impl.data.text_encoder import TextRecipe
from megatron_core_impl.data.text_files import SourceFile

folder = Path(sys.argv[1])
job = Job((SourceFile(folder / "data.jsonl", "data.jsonl"),), TextRecipe(folder), Path(sys.argv[2]) / "out", 200)
results = tokenize(job, 2)
for _ in range(5):
    next(results)
print("working", flush=True)
sys.stdin.read()
"""


def test_workers_leave_when_their_parent_is_killed_and_another_goes_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(folder), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == "working\n"
    parent.kill()
    assert parent.stdout.read() == ""  # the end comes only when all who hold the pipe, so every worker, are gone
    parent.wait()
    told, _, content = make(job(folder, tmp_path), 2)
    assert not any(progress.is_new for progress in told[:5])
    assert content == make_here(job(folder, tmp_path))[2]


def test_a_worker_whose_answer_nobody_takes_leaves_without_a_word(folder: Path, tmp_path: Path) -> None:
    """Its sending fails before it can see that nothing more will be asked: the other direction of the pipe is open."""
    work = job(folder, tmp_path).work
    work.folder.mkdir()
    ours, theirs = multiprocessing.Pipe()
    worker = subprocess.Popen(
        [sys.executable, "-m", "megatron_core_impl.data.worker", str(theirs.fileno())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    theirs.close()
    with ours, socket.socket(fileno=os.dup(ours.fileno())) as half:
        half.shutdown(socket.SHUT_RD)
        ours.send(work)
        ours.send((0, 0))
        assert worker.communicate(timeout=120)[0] == b""
    assert worker.returncode == 0
