"""How much of a training step is spent waiting for data: less than one percent.

    python benchmarks/data_loading.py

A dataset of short documents (the more of them in a sample, the more there is to read), a small Llama, the trainer as it is:
`data_wait_share` is what it writes into metrics.jsonl. Beside it what a batch costs to make, which is what a step would wait
where nothing was made ahead.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_core_impl.batches import training_batches
from megatron_core_impl.checkpoint.sharded import write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.indexed_dataset import IndexWriter
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Report, read_metrics
from megatron_core_impl.models.families import tensors
from megatron_core_impl.train_config import DataSet, Job, TrainConfig
from megatron_core_impl.trainer import train
from megatron_core_impl.training_data import open_data, prepare

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, LENGTH, BATCH = 32000, 512, 4
MODEL = ModelConfig(
    family="llama", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=LENGTH,
)  # fmt: skip


def write_inputs(folder: Path, tokens_of_document: int) -> None:
    random, total = np.random.RandomState(0), 4_000_000
    sizes = random.poisson(tokens_of_document, total // tokens_of_document).astype(np.int64) + 1
    random.randint(0, VOCABULARY, int(sizes.sum())).astype("<u2").tofile(folder / "data.bin")
    with IndexWriter(folder / "data", np.dtype("<u2"), len(sizes), len(sizes) + 1) as index:
        index.add_sizes(sizes.astype(np.int32))
        index.add_doc_idx(np.arange(1, len(sizes) + 1))
    generator = torch.Generator().manual_seed(0)
    pieces = [
        (one.name, one.shape, whole(one.shape), torch.randn(one.shape, generator=generator) * 0.02) for one in tensors(MODEL)
    ]
    write_rank_file(folder, 0, pieces)
    write_index(folder, layout={"tp": 1, "pp": 1, "dp": 1})


def measure(folder: Path, tokens_of_document: int, steps: int) -> dict[str, float]:
    write_inputs(folder, tokens_of_document)
    config = TrainConfig(
        steps=steps, sequence_length=LENGTH, micro_batch_size=BATCH, global_batch_size=BATCH, lr=1e-4, split="95,5,0",
        eval_interval=10**6, eval_batches=1, checkpoint_interval=10**6, log_interval=1,
    )  # fmt: skip
    sets = (DataSet(prefix=folder / "data", fingerprint="benchmark"),)
    job = Job(config=config, model=MODEL, weights=folder, sets=sets, folder=folder, cache=folder / "cache")
    start = time.perf_counter()
    prepare(job)
    index_seconds = time.perf_counter() - start
    data = open_data(job).train
    many = replace(job, config=replace(config, steps=200))
    start = time.perf_counter()
    made = sum(1 for _ in training_batches(data, many, Mesh.single(), 0))
    make_seconds = (time.perf_counter() - start) / made
    train(job, Mesh.single(), report=Report())
    lines = [line for line in read_metrics(folder) if "data_wait_share" in line]
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["seconds"] * line["data_wait_share"] for line in lines)
    return {
        "index_seconds": index_seconds, "make_seconds": make_seconds, "step_seconds": seconds / steps,
        "wait_share": waited / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "data_loading.json")
    options = parser.parse_args()
    results = {}
    for tokens_of_document in (1000, 20):
        with tempfile.TemporaryDirectory() as folder:
            results[tokens_of_document] = found = measure(Path(folder), tokens_of_document, options.steps)
        print(
            f"documents of {tokens_of_document:>4} tokens: a batch of {BATCH} × {LENGTH} takes "
            f"{1e3 * found['make_seconds']:.2f} ms to make, a step {1e3 * found['step_seconds']:.0f} ms; "
            f"waited for data {found['wait_share']:.3%} of the time"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
