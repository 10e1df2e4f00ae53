"""The command `finetune dataset`: what it takes, prints and refuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from indexed_writer import IndexedDatasetWriter
from tiny_tokenizers import CODE
from workspaces import Workspace, make_workspace, rewrite

from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.streams import bin_path
from stages import dataset

ROOT = Path(__file__).parents[2]


def write(prefix: Path, *documents: list[int]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_sequence(tokens)
            writer.end_document()
    return prefix


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"), documents=CODE)


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that succeeds."""
    assert dataset.main([*map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that fails."""
    assert dataset.main([*map(str, arguments)]) == dataset.BAD
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", [], [1], [2, 3, 4], [], [5] * 20)
    assert told(capsys, "inspect", tmp_path / "data.bin") == (
        f"{tmp_path}/data\n"
        "  5 documents in 5 sequences, 24 tokens, uint16, 48 B\n"
        "  tokens of a document: 0 to 20, mean 4.8\n"
        f"   0        2  {'█' * 40}\n"
        f"   1 to  1  1  {'█' * 20}\n"
        f"   2 to  3  1  {'█' * 20}\n"
        f"  16 to 31  1  {'█' * 20}\n"
    )
    write(tmp_path / "one", [7])
    assert "  1 document in 1 sequence, 1 token, uint16, 2 B\n" in told(capsys, "inspect", tmp_path / "one")
    assert told(capsys, "inspect", tmp_path / "data", "--document", 2) == "2 3 4\n"
    assert "--ids prints those of a document: name it with --document" in refused(capsys, "inspect", tmp_path / "one", "--ids")
    error = refused(capsys, "inspect", tmp_path / "lost")
    assert error == (
        f"error: there is no dataset {tmp_path}/lost, neither .bin and .idx nor -text and -role. "
        f"Name one of: {tmp_path}/data, {tmp_path}/one\n"
    )
    assert f"Name one of: {tmp_path}/data, {tmp_path}/one" in refused(capsys, "inspect", tmp_path)  # a folder


def test_inspect_a_result(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workspace.dataset.folder(workspace.root)
    for path in (folder, folder / "data", folder / "data.idx"):
        assert told(capsys, "inspect", path, "--document", 0) == f"{CODE[0]}</s>\n"
        ids = told(capsys, "inspect", path, "--document", 0, "--ids")
        assert ids.split() == [*map(str, IndexedDataset(folder / "data")[0])]
        assert ids.endswith(" 2\n")
    model = workspace.model.folder(workspace.root)
    assert f"{model}: is the result of download, not of preprocess" in refused(capsys, "inspect", model)


def test_merge_takes_what_inspect_takes(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workspace.dataset.folder(workspace.root)
    paths = [folder, folder / "data.bin", write(tmp_path / "more", [1])]
    assert told(capsys, "merge", "--output", tmp_path / "all.idx", *paths) == (
        f"3 datasets, 9 documents: {tmp_path}/all.bin, {tmp_path}/all.idx\n"
    )
    tokens = bin_path(folder / "data").read_bytes()
    assert (tmp_path / "all.bin").read_bytes() == tokens + tokens + b"\1\0"


def test_merge_compares_tokenizers_where_they_are_known(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = workspace.dataset.folder(workspace.root), tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    rewrite(other, lambda content: content["tokenizer"].update(fingerprint="0" * 64))
    error = refused(capsys, "merge", "--output", tmp_path / "all", folder, write(tmp_path / "more", [1]), other / "data")
    assert error == f"error: {folder} and {other}/data were made with different tokenizers. Tokenize them with the same one\n"
    rewrite(other, lambda content: content["sets"].append({**content["sets"][0], "name": "valid-0"}))
    write(other / "valid-0", [1])
    error = refused(capsys, "merge", "--output", tmp_path / "all", other)
    assert f"{other}: holds 2 sets; name one: {other}/data, {other}/valid-0" in error


def test_the_reader_of_a_pipe_may_leave(tmp_path: Path) -> None:
    write(tmp_path / "data", [1])
    command = [sys.executable, "-m", "stages.dataset", "inspect", str(tmp_path / "data")]
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write_end)
    assert (done.stderr, done.returncode) == (b"", -signal.SIGPIPE)
