"""`finetune checkpoint reshard`: what it takes, prints and refuses, and that training goes on from what it makes."""

import argparse
import shutil
from pathlib import Path

import pytest
from tiny_job import assert_close, changed, make_job, stop_after
from tiny_training import MODEL
from weights_inputs import make_checkpoint, random_model

from megatron_core_impl.checkpoint.training import commit, step_folder, unfinished_folder
from megatron_core_impl.config import Layout, RopeScaling
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.tensors import tensors
from megatron_core_impl.train_config import Job
from megatron_core_impl.trainer import train
from stages.reshard_checkpoint import add_arguments, find_checkpoint, model_of, reshard


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    reshard(parser.parse_args([*map(str, arguments)]))


@pytest.fixture
def stopped(tmp_path: Path) -> Job:
    """A training that was stopped after its third step."""
    job = make_job(tmp_path)
    train(job, Mesh.single(), should_stop=stop_after(3))
    return job


def test_training_goes_on_from_what_it_makes(stopped: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = changed(stopped, "straight")
    train(straight, Mesh.single())
    run(stopped.folder, "--tp", 2, "--pp", 2, "--vpp", 1, "--dp", 2, "--output", tmp_path / "moved")
    told = capsys.readouterr().out
    names = 3 * len(tensors(MODEL))
    assert told.startswith(f"step 3, tp 1 · pp 1 · dp 1 → tp 2 · pp 2 · dp 2: {names} tensors, ")
    assert told.endswith(f", bit for bit, in {tmp_path}/moved/step-000003\n")
    ranks = [path.name for path in (tmp_path / "moved" / "step-000003").glob("rank-*")]
    assert len(ranks) == 8
    shutil.rmtree(step_folder(stopped.checkpoints, 3))
    shutil.move(tmp_path / "moved" / "step-000003", stopped.checkpoints)
    train(stopped, Mesh.single())
    assert_close(stopped, straight, 6, 0)


def test_what_names_a_checkpoint(stopped: Job, tmp_path: Path) -> None:
    expected = step_folder(stopped.checkpoints, 3)
    for path in (stopped.folder, stopped.checkpoints, step_folder(stopped.checkpoints, 3)):
        assert find_checkpoint(path) == expected
    artifact = make_checkpoint(tmp_path / "ws", random_model(), layout=Layout())
    folder = artifact.folder(tmp_path / "ws")
    (folder / artifact.checkpoint / "state.json").touch()
    assert find_checkpoint(folder) == folder / artifact.checkpoint
    with pytest.raises(ValueError, match=r"weights: holds no training checkpoint\. Name the result of a train stage"):
        find_checkpoint(tmp_path / "weights")


def test_refusals(stopped: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tp=3 cannot share out num_attention_heads=4 .* Legal here: 1, 2, 4$"):
        run(stopped.folder, "--tp", 3, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="vpp=2 needs pp of at least 2"):
        run(stopped.folder, "--vpp", 2, "--output", tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"step-000003 is there already: name another folder, or remove it first"):
        run(stopped.folder, "--output", stopped.checkpoints)
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"--output: .*file/x cannot be made: Not a directory. Name a folder where you may write$"
    ):
        run(stopped.folder, "--output", tmp_path / "file" / "x")
    state = step_folder(stopped.checkpoints, 3) / "state.json"
    state.write_text(state.read_text().replace('"consumed_samples": ', '"consumed_samples": 1'))
    with pytest.raises(ValueError, match=r"state\.json is not what was written: its digest of itself differs"):
        run(stopped.folder, "--output", tmp_path / "out")
    state.parent.rename(unfinished_folder(stopped.checkpoints, 3))
    commit(stopped.checkpoints, 3, {"step": 3}, keep=9)
    with pytest.raises(ValueError, match=r"state\.json does not tell its model: 'must_agree'"):
        run(stopped.folder, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_name(stopped: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = step_folder(stopped.checkpoints, 3).rename(tmp_path / "backup")
    run(folder, "--output", tmp_path / "moved")
    assert capsys.readouterr().out.endswith(f", bit for bit, in {tmp_path}/moved/step-000003\n")


def test_the_model_comes_back_from_the_state() -> None:
    from dataclasses import asdict, replace

    scaled = replace(MODEL, rope_scaling=RopeScaling(kind="llama3", factor=8.0))
    for model in (MODEL, scaled):
        assert model_of({"must_agree": {"model": asdict(model)}}, Path("x")) == model
