"""The stages of weights as real processes, when things go wrong: an altered input, a kill, a full disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from weights_inputs import HF, make_checkpoint, make_model, random_model, ref

from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout
from stages import convert, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.process import ExitCode
from stages.contracts.specs import ConvertSpec, MergeSpec, ShardSpec, Spec

# Runs a stage that kills itself, as the kernel would, at the n-th block of rows it writes.
KILLED = """
import os, runpy, signal, sys
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsWriter
write, left = SafetensorsWriter.write_bytes, int(sys.argv.pop())
def write_bytes(self, name, first, rows):
    global left
    left -= 1
    if left == 0:
        write(self, name, first, rows[: len(rows) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, first, rows)
SafetensorsWriter.write_bytes = write_bytes
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start(spec: Spec, tmp_path: Path, *program: str, after: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the stage of a spec as a process to its end."""
    file = tmp_path / f"{spec.STAGE}.json"
    file.write_text(spec.model_dump_json())
    command = [sys.executable, *(program or ("-m",)), f"stages.{spec.STAGE}", str(file), *after]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def published(workspace: Path, stage: str) -> list[str]:
    """What lies in a stage's folder, but for locks."""
    folder = workspace / stage
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_altered_input_is_refused_by_file(tmp_path: Path) -> None:
    model = make_model(tmp_path, random_model())
    flip_a_byte(model.folder(tmp_path) / "files" / "model.safetensors")
    done = start(ConvertSpec(workspace=str(tmp_path), inputs={"model": ref(model)}), tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert done.stderr.startswith("error: convert: inputs.model: ")
    assert "files/model.safetensors: its digest is not the one its artifact records: it was changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert published(tmp_path, "convert") == []


def test_altered_checkpoint_is_refused_by_file(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, random_model(dtype=torch.float32), layout=Layout(tp=2))
    flip_a_byte(checkpoint.folder(tmp_path) / "checkpoints" / "step-000002" / "rank-0001.safetensors")
    done = start(MergeSpec(workspace=str(tmp_path), inputs={"checkpoint": ref(checkpoint)}), tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert done.stderr.startswith("error: merge: inputs.checkpoint: ")
    assert "step-000002/rank-0001.safetensors: its digest is not the one" in done.stderr
    assert published(tmp_path, "merge") == []


def test_killed_in_the_middle_publishes_nothing_and_the_next_run_completes(tmp_path: Path) -> None:
    tensors = random_model()
    model = make_model(tmp_path, tensors)
    spec = ConvertSpec(workspace=str(tmp_path), inputs={"model": ref(model)})
    weights = runtime.execute(spec, convert.run)
    shard = ShardSpec(workspace=str(tmp_path), inputs={"weights": ref(weights)}, tp=2)

    killed = start(shard, tmp_path, "-c", KILLED, after=("40",))  # 30 blocks in the first rank's file, 23 in the second's
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert published(tmp_path, "shard") == [f".{shard.key}.partial"]
    partial = tmp_path / "shard" / f".{shard.key}.partial"
    assert sorted(path.name for path in partial.iterdir()) == ["rank-0000.safetensors", "rank-0001.safetensors"]

    done = start(shard, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["shard: tp 2 · pp 1", f"shard: {shard.folder}"]
    assert published(tmp_path, "shard") == [shard.key]
    reader = open_weights(shard.folder)
    assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_said_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    hf = HF | {"vocab_size": 4000}
    model = make_model(small_disk, random_model(hf), hf=hf)  # 560 kB: it fits once
    weights = runtime.execute(ConvertSpec(workspace=str(small_disk), inputs={"model": ref(model)}), convert.run)  # a link
    done = start(ShardSpec(workspace=str(small_disk), inputs={"weights": ref(weights)}), tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert done.stderr.startswith("error: shard: no space left at ")
    assert "rank-0000.safetensors: make room or choose another workspace, then run again" in done.stderr
    assert "Traceback" not in done.stderr
    assert published(small_disk, "shard") == []


def test_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without root: the kernel's error has no file name, ours has, and half a file does not stay."""

    def no_room(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = SafetensorsWriter(tmp_path / "t.safetensors", [("t", torch.float32, (2,))])
    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(OSError, match="No space left on device") as caught, writer:
        writer.write("t", torch.zeros(2))
    assert caught.value.filename == str(tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_finished_result_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, random_model())
    spec = ConvertSpec(workspace=str(tmp_path), inputs={"model": ref(model)})
    first = runtime.execute(spec, convert.run)

    def run(spec: ConvertSpec, ctx: Context) -> a.Artifact:
        raise AssertionError("made again")

    assert runtime.execute(spec, run) == first
