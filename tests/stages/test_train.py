"""The train stage as a process: it trains, stops when asked, goes on; whatever dies, it says so and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import asleep
from tiny_training import MODEL
from train_inputs import cut_spec, put_conversations, put_weights, spec_of

from megatron_core_impl import metrics, trainer
from megatron_core_impl.checkpoint.training import finished_steps
from megatron_core_impl.mesh import Mesh
from stages import runtime, torchrun, train
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.process import ExitCode
from stages.contracts.specs import TrainSpec
from stages.contracts.training_job import INDEX
from stages.outcomes import GateFailed, Interrupted, StageError

ASLEEP_SECONDS = 17.0  # longer than 15, after which torchrun takes a machine for gone whose torchrun is silent


def scratch_of(spec: TrainSpec) -> Path:
    return spec.folder.parent / f".{spec.key}.partial"


class Stage:
    """A train stage that runs as a process."""

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec
        file = Path(spec.workspace) / "spec.json"
        file.write_text(spec.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stages.train", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "STAGE_EVENTS": "0"},
        )  # fmt: skip

    def wait_for(self, start: str) -> str:
        """Read on until a line that begins so."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith(start):
                return line
        raise AssertionError("".join(seen) + self.end()[1])

    def processes(self) -> dict[str, int]:
        """torchrun and the workers: process ids by rank, torchrun's under ""."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(scratch_of(self.spec)) in (folder / "cmdline").read_text():
                    variables = (folder / "environ").read_text().split("\0")
                    rank = next((v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")), "")
                    found[rank] = int(folder.name)
            except OSError:
                continue
        return found

    def end(self) -> tuple[int, str, str]:
        """Exit code, what is left of stdout, stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[Callable[[TrainSpec], Stage]]:
    stages: list[Stage] = []

    def start(spec: TrainSpec) -> Stage:
        stages.append(Stage(spec))
        return stages[-1]

    yield start
    for stage in stages:
        stage.process.kill()
        stage.process.communicate()


def test_stops_when_asked_and_goes_on_under_another_layout(tmp_path: Path, start: Callable[[TrainSpec], Stage]) -> None:
    """The stage as the pipeline starts it, then with shards of the other layout, and asleep in the middle."""
    spec = cut_spec(tmp_path, tp=2, steps=160)  # more than it does before the signal arrives
    stage = start(spec)
    stage.wait_for("2 processes, dp 1 × tp 2 × pp 1")
    stage.wait_for("length: 160 steps × 4 × 16 = 10.2 K tokens = 8.5 epochs")
    stage.wait_for("memory of a process, estimated: ")
    stage.wait_for("step   2/160 · loss ")
    stage.process.send_signal(signal.SIGTERM)
    code, _, err = stage.end()
    assert code == ExitCode.INTERRUPTED
    [step] = finished_steps(scratch_of(spec) / "checkpoints")
    assert 2 <= step < 160
    assert err == f"error: train: stopped; saved at step {step}; run again to go on from step {step}\n"
    assert not spec.folder.exists()
    assert stage.processes() == {}

    key, shards = spec.key, spec.inputs["weights"].path
    spec = cut_spec(tmp_path, pp=2, steps=160)
    assert spec.key == key
    assert spec.inputs["weights"].path != shards
    stage = start(spec)
    stage.wait_for(f"going on from the checkpoint at step {step}")
    stage.wait_for("step ")
    processes = stage.processes()
    assert processes.keys() == {"", "0", "1"}
    asleep([stage.process.pid, *processes.values()], ASLEEP_SECONDS)
    code, out, err = stage.end()
    assert (code, err) == (0, "")
    assert "train: held-out loss " in out
    artifact = intact.find_intact(spec.folder)
    assert isinstance(artifact, a.CheckpointArtifact)
    assert (artifact.step, artifact.consumed_samples, artifact.consumed_tokens) == (160, 640, 10240)
    assert (artifact.tp, artifact.pp, artifact.dp, artifact.vpp) == (1, 2, 1, 1)
    assert artifact.loss_after < 0.8 * artifact.loss_before
    assert artifact.figure.startswith(f"held-out loss {artifact.loss_before:.2f} → {artifact.loss_after:.2f} · perplexity ")
    assert artifact.figure.endswith(" · checkpoint at step 160")
    assert artifact.checkpoint == "checkpoints/step-000160"
    assert {path.name for path in spec.folder.iterdir()} >= {"artifact.json", "checkpoints", "metrics.jsonl", "tensorboard"}
    assert [path.name for path in (spec.folder / "checkpoints").iterdir()] == ["step-000160"]
    names = ("index.json", "rank-0000.safetensors", "rank-0001.safetensors", "state.json")
    assert [name for name, file in artifact.files.items() if not file.volatile] == [f"{artifact.checkpoint}/{n}" for n in names]
    assert str(tmp_path) not in (spec.folder / "artifact.json").read_text()
    assert str(tmp_path) not in (spec.folder / artifact.checkpoint / "state.json").read_text()
    assert [line["step"] for line in metrics.read_metrics(spec.folder) if "loss" in line] == list(range(1, 161))
    assert len(artifact.metrics["loss_curve"]) == 160
    assert artifact.metrics["length"] == {"steps": 160, "tokens": 10240, "epochs": pytest.approx(8.5, abs=0.01)}
    assert 0 <= artifact.metrics["data_wait_share"] < 1
    assert artifact.metrics["evaluation_seconds"] > 0
    assert artifact.metrics["loss_test"] is None
    assert 0 <= artifact.metrics["accuracy_before"] < artifact.metrics["accuracy_after"] <= 1
    assert not [name for name in artifact.metrics if "conversations" in name or "packing" in name or "instruct" in name]
    assert len(list((tmp_path / INDEX).glob("*/key.json"))) == 2, "train and valid, made once for all ranks"
    assert not scratch_of(spec).exists()


def test_the_figures_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in this process, as what is published is all that matters."""
    dataset = put_conversations(tmp_path, [8] * 60 + [20] * 3 + [40] * 2)
    spec = spec_of(tmp_path, dataset=dataset, too_long="truncate", steps=3, split="60,20,20")
    weights = a.load_artifact(tmp_path / spec.inputs["weights"].path)
    told: list[str] = []

    def run_workers(*arguments: object, on_event: Callable[[torchrun.Event], None], log: Path, **more: object) -> object:
        job = train.job_of(spec, weights, dataset, log.parents[1])  # type: ignore[arg-type]
        trainer.train(job, Mesh.single(), report=metrics.Report(log=told.append))
        on_event({"event": "done", "rank": 0})
        return torchrun.Outcome()

    monkeypatch.setattr(torchrun, "run_workers", run_workers)
    figures = runtime.execute(spec, train.run, resumable=True).metrics
    assert told[0] == "data: of 65 conversations 5 too long, cut off; 2 with nothing to learn, left out"
    assert [figures[f"conversations_{name}"] for name in ("too_long", "too_short", "nothing_to_learn")] == [5, 0, 2]
    assert 0.8 < figures["packing_efficiency"] < 1
    lines = metrics.read_metrics(spec.folder)
    for when, step, split in (("before", 0, "valid"), ("after", 3, "valid"), ("test", 3, "test")):
        [line] = [line for line in lines if line["step"] == step and f"{split}_loss" in line]
        for name in ("accuracy", "instruct_accuracy"):
            assert figures[f"{name}_{when}"] == pytest.approx(line[f"{split}_{name}"], abs=1e-5)
    keys = [json.loads(file.read_text())["kind"] for file in (tmp_path / INDEX).glob("*/key.json")]
    assert sorted(keys) == ["conversations that teach", "packing", "packing", "packing"], "made once for all who open the set"


def test_a_killed_worker_is_named_and_takes_nobody_along_unseen(tmp_path: Path, start: Callable[[TrainSpec], Stage]) -> None:
    spec = spec_of(tmp_path, dp=2, steps=2000, checkpoint_interval=3, keep_checkpoints=2)
    stage = start(spec)
    stage.wait_for("step    5/2000 · loss ")
    os.kill(stage.processes()["1"], signal.SIGKILL)
    code, _, err = stage.end()
    last = finished_steps(scratch_of(spec) / "checkpoints")[0]
    assert code == ExitCode.BAD_INPUT
    assert err.startswith("error: train: rank 1 was killed by the kernel (out of memory?) in step ")
    assert f". Last checkpoint: step {last}. Lower train.micro_batch_size (now 2) if memory is short; else run again to" in err
    assert err.count("\n") == 1, "one line, no traceback of those who missed it"
    assert stage.processes() == {}
    assert not list((scratch_of(spec) / "checkpoints").glob("*.tmp"))


def test_an_error_of_all_workers_is_told_once(tmp_path: Path, start: Callable[[TrainSpec], Stage]) -> None:
    wrong = put_weights(tmp_path, replace(MODEL, intermediate_size=32), tp=2)
    code, out, err = start(spec_of(tmp_path, tp=2, weights=wrong)).end()
    assert code == ExitCode.BAD_INPUT
    assert err.startswith("error: train: model.layers.0.mlp.gate_proj.weight ")
    assert "(24, 16)" in err
    assert "(32, 16)" in err
    assert err.count("\n") == 1
    assert "Traceback" not in out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB: enough for the inputs of a training, not for its checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, start: Callable[[TrainSpec], Stage]) -> None:
    spec = spec_of(small_disk, steps=3, checkpoint_interval=1)
    code, _, err = start(spec).end()
    assert code == ExitCode.BAD_INPUT
    assert err.startswith("error: train: no space left at ")
    assert "make room or choose another workspace, then run again" in err
    assert not spec.folder.exists()
    assert not list(scratch_of(spec).glob("checkpoints/*.tmp"))


def test_a_worker_of_a_further_machine_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 is elsewhere, and the last pp rank may be here: what it warns of is told by nobody else."""

    def run_workers(*given: Any, on_event: Callable[[torchrun.Event], None], **named: Any) -> torchrun.Outcome:
        on_event({"event": "warn", "rank": 1, "text": "rank 1 needs about 90 GB, and its GPU has 80 GB"})
        return torchrun.Outcome()

    monkeypatch.setattr(torchrun, "run_workers", run_workers)  # a real one would need a GPU that is too small
    spec = spec_of(tmp_path)
    train.take_part(spec, Context(spec, tmp_path))
    assert capsys.readouterr().out == "warning: rank 1 needs about 90 GB, and its GPU has 80 GB\n"


# Inputs that do not fit: refused before anything is started


def test_a_changed_byte(tmp_path: Path, start: Callable[[TrainSpec], Stage]) -> None:
    spec = spec_of(tmp_path)
    file = tmp_path / spec.inputs["dataset"].path / "data.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    code, _, err = start(spec).end()
    assert code == ExitCode.BAD_INPUT
    assert err.startswith(f"error: train: inputs.dataset: {file}: its digest is not the one its artifact records")


# What is said of an end


def outcome_text(tmp_path: Path, outcome: torchrun.Outcome, step: int = 40, **settings: Any) -> tuple[type, str]:
    error = train.failure(outcome, spec_of(tmp_path, **settings), tmp_path, step)
    return type(error), str(error)


def test_a_pause_is_an_interruption(tmp_path: Path) -> None:
    """The worker stops by itself, as stop_after_minutes asks: not finished, and nothing is wrong."""
    with pytest.raises(Interrupted, match=r"^stopped; saved at step 1; run again to go on from step 1$"):
        runtime.execute(spec_of(tmp_path, stop_after_minutes=0.0001), train.run, resumable=True)


def test_out_of_memory(tmp_path: Path) -> None:
    outcome = torchrun.Outcome(returncode=1, errors=[{"kind": "memory", "rank": 3}])
    (tmp_path / "checkpoints" / "step-000040").mkdir(parents=True)
    kind, text = outcome_text(tmp_path, outcome, micro_batch_size=4)
    assert text == "rank 3 ran out of memory in step 41. Last checkpoint: step 40. Lower train.micro_batch_size (now 4)"
    _, text = outcome_text(tmp_path, outcome, step=0, micro_batch_size=1)
    assert "before its first step was done" in text
    assert text.endswith(
        "Set train.recompute to full (now none), lower train.sequence_length (now 16), or raise layout.tp (now 1) or pp (now 1)"
    )
    assert kind is StageError


def test_a_defect_shows_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"kind": "crash", "rank": 1, "message": "KeyError: 'x'", "trace": "Traceback …\nKeyError: 'x'"}
    outcome = torchrun.Outcome(returncode=1, errors=[event, {**event, "rank": 0, "message": "connection closed by peer"}])
    kind, text = outcome_text(tmp_path, outcome)
    assert kind is train.WorkerCrashed
    assert train.WorkerCrashed.code == ExitCode.CRASH
    assert text.startswith("rank 1, in step 41: KeyError: 'x'. This is a defect of ours; its log has the traceback")
    assert str(tmp_path / "logs" / "workers.log") in text
    assert capsys.readouterr().err == "Traceback …\nKeyError: 'x'\n"


def test_divergence_is_a_failed_check(tmp_path: Path) -> None:
    outcome = torchrun.Outcome(returncode=1, errors=[{"kind": "diverged", "rank": 0, "message": "Lower lr"}])
    assert outcome_text(tmp_path, outcome) == (GateFailed, "Lower lr")


def test_another_signal_is_named(tmp_path: Path) -> None:
    kind, text = outcome_text(tmp_path, torchrun.Outcome(returncode=1, killed=(2, signal.SIGSEGV)))
    assert kind is train.WorkerCrashed
    assert text.startswith("rank 2 died of SIGSEGV in step 41. There is no checkpoint yet")
