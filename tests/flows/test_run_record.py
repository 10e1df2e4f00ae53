"""Records of runs: on disk at once, true about the dead, readable by others at any moment."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from flows.asked.graph import nodes_of, with_dependents
from flows.finetune import RunName
from flows.records.run_record import LiveRecord, RunFolder, RunIsLive, RunRecord, all_runs, new_name, now
from stages.contracts import words


def record(name: str) -> RunRecord:
    return RunRecord(name=name, config={}, cwd="/", pid=os.getpid(), started=now())


def test_a_live_run_and_a_dead_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "brisk-otter")
    assert folder.read() is None
    with folder.held():
        live = LiveRecord(folder, record("brisk-otter"))
        live.node("train", state="running", done=0.5)
        read = folder.read()
        assert read is not None
        assert (read.state, read.nodes["train"].done) == ("running", 0.5)
        assert read == live.snapshot()
    read = folder.read()
    assert read is not None
    assert (read.state, read.error) == ("crashed", "its process is gone")


def test_names_of_runs(tmp_path: Path) -> None:
    form = TypeAdapter(RunName)  # as the flow's, and with it the browser's form and the server
    for name in ("a", "7b.lr_1e-4", "x" * 64):
        assert form.validate_python(name) == RunFolder(tmp_path, name).name
    for name in ("", ".", "-a", "été", "café", "a b", "a/b", "a\n", "x" * 65):
        with pytest.raises(ValidationError):
            form.validate_python(name)
        with pytest.raises(ValueError, match=r"is no name of a run: ASCII letters \(a to z, A to Z\), .* 64 at most"):
            RunFolder(tmp_path, name)


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from flows.records.run_record import RunFolder
with RunFolder(Path({str(tmp_path)!r}), "a").held():
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    folder = RunFolder(tmp_path, "a")
    assert folder.is_live()
    with pytest.raises(RunIsLive, match="run a is going on in another process"), folder.held():
        pass
    holder.kill()
    holder.wait()
    assert not folder.is_live()
    with folder.held():
        pass


def test_links_point_to_results_and_move_with_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "ws" / "train" / "k1").mkdir(parents=True)
    (tmp_path / "ws" / "train" / "k2").mkdir()
    folder = RunFolder(tmp_path / "ws", "a")
    folder.path.mkdir(parents=True)
    folder.link("train", "train/k1")
    folder.link("train", "train/k2")
    assert (folder.path / "train").readlink() == Path("../../train/k2")
    (tmp_path / "ws").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "runs" / "a" / "train").resolve() == tmp_path / "moved" / "train" / "k2"


def test_all_runs_newest_first_and_broken_ones_left_out(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        folder = RunFolder(tmp_path, name)
        folder.path.mkdir(parents=True)
        folder.write(record(name).model_copy(update={"started": now() - timedelta(hours=age), "state": "done"}))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    assert [run.name for run in all_runs(tmp_path)] == ["new", "old"]
    assert new_name(tmp_path) not in ("new", "old")


def test_the_graph_in_people_s_words() -> None:
    assert nodes_of("download") == ["download-model", "download-data"]
    assert nodes_of("download-data") == ["download-data"]
    assert with_dependents(nodes_of("train")) == ["train", "merge", "export", "push"]
    assert with_dependents(nodes_of("verify")) == ["verify", "push"]
    with pytest.raises(ValueError, match=r"there is no stage trian\. Legal here: convert, download, download-data"):
        nodes_of("trian")


def test_figures_as_people_read_them() -> None:
    assert [words.seconds(s) for s in (0.04, 9.94, 9.96, 59.6, 192, 3600 * 2 + 300)] == [
        "0.0s", "9.9s", "10s", "1m 00s", "3m 12s", "2h 05m"]  # fmt: skip
    assert [words.size(b) for b in (512, 12_400_000, 1.4e9, 999_600, 123_456)] == [
        "512 B", "12.4 MB", "1.4 GB", "1.0 MB", "123 kB"]  # fmt: skip
    assert [words.short(n) for n in (950, 6.74e9, 512e6)] == ["950", "6.74 B", "512 M"]
    moment = now()
    assert [words.ago(moment - timedelta(seconds=s), moment) for s in (5, 840, 7300, 260000)] == [
        "5s ago", "14m ago", "2h ago", "3d ago"]  # fmt: skip
    assert words.plain("a\x1b[31mb\nc") == "a [31mb c"
