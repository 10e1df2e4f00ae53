"""Training against the reference: losses and gradient norms that Megatron-LLM computed on a CPU (../shared/golden/training).

The learning rate of step 1 is 0, so only from step 3 on does a loss follow from an update. GOLDEN=all compares all 20 steps.
"""

import gzip
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import GlooPool
from indexed_writer import IndexedDatasetWriter
from tiny_job import train_on_rank

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.reshard import reshard
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout, ModelConfig, RopeScaling
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.metrics import read_metrics
from megatron_core_impl.models import families
from megatron_core_impl.train_config import DataSet, Job, TrainConfig

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"

ALL = os.environ.get("GOLDEN") == "all"  # all 20 steps of all runs take minutes

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")


@dataclass(frozen=True)
class Run:
    """A run of the reference, and what it is with us."""

    name: str
    layout: Layout = field(default_factory=Layout)
    settings: dict[str, Any] = field(default_factory=dict)
    rope_scaling: RopeScaling | None = None
    steps: int = 1  # how many of its steps a test takes, if not all
    model: str = "llama2_gqa"


RUNS = (
    Run("gqa_tp1", steps=3),
    Run("gqa_dp2", Layout(dp=2)),
    Run("gqa_pp4", Layout(pp=4)),
    Run("gqa_pp4_vpp", Layout(pp=2, vpp=2)),  # there pp 4 with one layer per virtual stage, which is one chunk per rank
    Run("gqa_tp2_flash", Layout(tp=2)),
    Run(  # the first sample that holds the end of a document comes in step 7; until then it is gqa_tp1
        "gqa_eodmask",
        Layout(tp=2),  # there one process
        settings={
            "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True, "reference_loss_mean": True,
        },
        steps=7,
    ),
    Run("gqa_recompute_full", settings={"recompute": "full"}),
    Run("gqa_rope8", rope_scaling=RopeScaling(kind="linear", factor=8)),
    Run("falcon7", model="falcon7", steps=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and the dataset of all runs."""
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    script = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
    assert script is not None
    assert script.loader is not None
    make_models = importlib.util.module_from_spec(script)
    script.loader.exec_module(make_models)
    try:
        make_models.main(folder / "hf", [])
    except SystemExit as error:
        pytest.skip(str(error))
    for name in make_models.MODELS:
        config = model_config(folder, name)
        (folder / name).mkdir()
        source = Rearranged(open_weights(folder / "hf" / name), invert(families.family_of(config).hf_tensors(config)))
        reshard(source, folder / name, families.tensors(config), Layout())
    write_dataset(folder / "dataset")


def model_config(folder: Path, name: str) -> ModelConfig:
    return families.config_from_hf(json.loads((folder / "hf" / name / "config.json").read_text()))


def write_dataset(folder: Path) -> None:
    """What the reference's preprocessing writes with --append_eod."""
    folder.mkdir()
    shutil.copy(GOLDEN / "tokenizer" / "llama2.model", folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder, "sentencepiece", parse_special=True)
    assert tokenizer.eod_id == 2
    with (
        gzip.open(GOLDEN / "preprocess" / "code.jsonl.gz", "rt") as lines,
        IndexedDatasetWriter(folder / "data", np.uint16) as out,
    ):
        for line in lines:
            out.add_sequence([*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id])
            out.end_document()


def job_of(run: Run, inputs: Path, folder: Path) -> Job:
    config = TrainConfig(
        steps=20, sequence_length=256, micro_batch_size=2, global_batch_size=8, lr=1e-3, min_lr=1e-4, warmup_steps=5,
        split="969,30,1", eval_interval=100, eval_batches=1, checkpoint_interval=100, log_interval=1, reference_first_lr=True,
        **run.settings,
    )  # fmt: skip
    return Job(
        config=config, model=replace(model_config(inputs, run.model), rope_scaling=run.rope_scaling),
        weights=inputs / run.model, sets=(DataSet(prefix=inputs / "dataset" / "data", fingerprint="f"),), folder=folder,
        eod_id=2,
    )  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_equals_the_reference(run: Run, inputs: Path, tmp_path: Path, pool: GlooPool) -> None:
    job = job_of(run, inputs, tmp_path)
    steps = job.config.steps if ALL else run.steps
    if run.layout.world_size == 1:
        train_on_rank(job, run.layout, steps)
    else:
        pool.run(train_on_rank, run.layout.world_size, job, run.layout, steps, timeout=60 + 60 * steps)
    ours = [line for line in read_metrics(job.folder) if "loss" in line]
    theirs = json.loads((GOLDEN / "training" / f"{run.name}.json").read_text())[:steps]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["lm_loss"], rel=0, abs=2e-6)
    assert [line["loss"] for line in ours] == pytest.approx([line["lm_loss"] for line in theirs], rel=0, abs=5e-6)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=2e-6, abs=0)
    assert [line["lr"] for line in ours] == pytest.approx([0, *(line["lr_of_next_step"] for line in theirs[:-1])], rel=1e-12)
