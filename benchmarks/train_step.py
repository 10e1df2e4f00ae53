"""One training step of ours against one of transformers: tokens per second and peak memory, side by side on this machine.

    python benchmarks/train_step.py            all of it, some minutes
    python benchmarks/train_step.py --quick    fewer steps, one thread
    python benchmarks/train_step.py --profile bf16 ours    where the time of one step goes, by operator

The model is a Llama of 58.5M parameters: hidden 512, 8 layers, 8 heads, ffn 1408, vocabulary 32000, untied; one micro batch of
4 × 512 tokens per step. Each side runs in a process of its own, and all take turns, a step each, so that what else the machine
does hits all alike. The figure is the median step; the ratio is that of the medians. CPU seconds are those of the process.

What is compared:
    ours          the trainer's step: fused output layer and loss, main gradients, clipping, AdamW. In bf16 the master weights,
                  main gradients and moments are fp32. As in the trainer, malloc keeps what is freed (`host_memory`).
    transformers  LlamaForCausalLM (SDPA), its own loss, clip_grad_norm_, torch's fused AdamW. In bf16 all of it is bf16,
                  moments too, as people do who fine-tune without masters: it moves half the bytes in the optimizer.
    kept          the same, but malloc keeps what is freed, as in our trainer: what would be left of the difference without it.
    tp2           ours on two ranks of one thread each, for the comparison with ours on one rank of two threads.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, LAYERS, HEADS, FFN, VOCABULARY = 512, 8, 8, 1408, 32000
BATCH, LENGTH = 4, 512
TOKENS = BATCH * LENGTH
Step = Callable[[], None]


def flops() -> float:
    """Of a step: 2 per weight and token in the forward pass, twice that in the backward pass; causal attention counts half."""
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
    attention = LAYERS * 2 * LENGTH * HIDDEN / 2  # multiplications per token: scores, and their sums of values
    return 6.0 * TOKENS * (weights + attention)


def ours(precision: str, tp: int) -> Step:
    import torch

    from megatron_core_impl.config import Layout, ModelConfig
    from megatron_core_impl.loss_scale import StaticLossScale
    from megatron_core_impl.mesh import init_mesh
    from megatron_core_impl.models.transformer import MicroBatch, Transformer
    from megatron_core_impl.optim import OptimizerSettings
    from megatron_core_impl.parallel.pipeline import Pipeline
    from megatron_core_impl.parallel.zero import ZeroOptimizer
    from megatron_core_impl.train_config import Rates
    from megatron_core_impl.train_step import train_step

    if tp > 1:
        torch.distributed.init_process_group("gloo")
    mesh = init_mesh(Layout(tp=tp), "cpu")
    config = ModelConfig(
        family="llama", vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HIDDEN // HEADS, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = Transformer(config, mesh, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    optimizer, pipeline = ZeroOptimizer(model, mesh, OptimizerSettings()), Pipeline(model)
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, LENGTH))

    def step() -> None:
        train_step(pipeline, optimizer, [batch], Rates(1e-4, 0.1), StaticLossScale())

    return step


def transformers(precision: str) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def gemm(precision: str) -> Step:
    """A large square product: what the machine can do."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]) for _ in "ab")

    def step() -> None:
        for _ in range(GEMM_TIMES):
            torch.mm(a, b)

    return step


GEMM_SIZE, GEMM_TIMES = 2048, 4


def make(side: str, precision: str) -> Step:
    from megatron_core_impl.host_memory import keep_freed_memory

    if side != "transformers":
        keep_freed_memory()
    if side in ("transformers", "kept"):
        return transformers(precision)
    return gemm(precision) if side == "gemm" else ours(precision, tp=2 if side == "tp2" else 1)


def serve(side: str, precision: str, threads: int) -> None:
    """The life of a measured process: for each line that comes in a step, and for each step a line of JSON: what it took."""
    import torch

    torch.set_num_threads(threads)
    step = make(side, precision)
    step()
    is_first = int(os.environ.get("RANK", 0)) == 0
    if is_first:
        print(json.dumps(None), flush=True)
    while _goes_on(is_first):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": peak_memory()}
        if is_first:
            print(json.dumps(took), flush=True)


def _goes_on(is_first: bool) -> bool:
    import torch

    line = torch.tensor(float(bool(sys.stdin.readline())) if is_first else 0.0)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(line, 0)
    return bool(line)


def peak_memory() -> int:
    """The most that this process has had in memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


class Side:
    """A measured process, or two of them under tp."""

    def __init__(self, name: str, precision: str, threads: int) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        ranks = 2 if name == "tp2" else 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, __file__, "--serve", name, precision, str(threads)]
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "RANK": str(rank),
                                  "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        self._answer()

    def step(self) -> None:
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()
        self.steps.append(self._answer())

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _answer(self) -> Any:
        stdout = self.processes[0].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended: see its message above")
        return json.loads(line)

    def result(self) -> dict[str, float]:
        """Medians over the steps."""
        wall, cpu = (statistics.median(step[key] for step in self.steps) for key in ("wall", "cpu"))
        tokens = TOKENS if self.name != "gemm" else 0
        return {
            "seconds": wall, "cpu_seconds": cpu, "tokens_per_second": tokens / wall,
            "best_seconds": min(step["wall"] for step in self.steps),
            "peak_bytes": self.steps[-1]["peak"], "steps": len(self.steps),
        }  # fmt: skip


@contextmanager
def running(names: list[str], precision: str, threads: dict[str, int]) -> Iterator[list[Side]]:
    sides: list[Side] = []
    try:
        for name in names:
            sides.append(Side(name, precision, threads[name]))
        yield sides
    finally:
        for side in sides:
            side.close()


def compare(names: list[str], precision: str, threads: dict[str, int], steps: int) -> dict[str, dict[str, float]]:
    """Let sides take turns."""
    with running(names, precision, threads) as sides:
        for _ in range(steps):
            for side in sides:
                side.step()
        return {side.name: side.result() for side in sides}


def report(precision: str, threads: int, found: dict[str, dict[str, float]]) -> None:
    rate = 2 * GEMM_SIZE**3 * GEMM_TIMES / found["gemm"]["best_seconds"]
    print(f"\n{precision}, {threads} thread{'s' * (threads > 1)}; GEMM of {GEMM_SIZE}: {rate / 1e9:.0f} GFLOP/s")
    for name in ("ours", "transformers", "kept"):
        side = found[name]
        print(
            f"  {name:<14}{side['tokens_per_second']:7.0f} tokens/s  {side['seconds']:6.2f} s  "
            f"{side['cpu_seconds']:6.2f} CPU s  {side['peak_bytes'] / 1e6:6.0f} MB  "
            f"{flops() / side['seconds'] / rate:5.1%} of the GEMM rate"
        )
    for name in ("transformers", "kept"):
        wall, cpu = (found[name][key] / found["ours"][key] for key in ("seconds", "cpu_seconds"))
        print(f"  ours is {wall:.2f} × as fast as {name}; {cpu:.2f} × by CPU seconds")


def profile(precision: str, side: str) -> None:
    import torch

    torch.set_num_threads(1)
    step = make(side, precision)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one thread")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="only this one")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "train_step.json", help="the JSON file"
    )
    parser.add_argument("--profile", nargs=2, metavar=("PRECISION", "SIDE"))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, precision, threads = options.serve
        return serve(side, precision, int(threads))
    if options.profile:
        return profile(*options.profile)
    steps = 3 if options.quick else 10
    results: dict[str, Any] = {"flops_per_step": flops(), "tokens_per_step": TOKENS}
    for precision in [options.precision] if options.precision else ["fp32", "bf16"]:
        for threads in [1] if options.quick else [1, 2]:
            names = ["ours", "transformers", "kept", "gemm"]
            found = compare(names, precision, dict.fromkeys(names, threads), steps)
            report(precision, threads, found)
            results[f"{precision}, {threads} threads"] = found
        if not options.quick:
            found = compare(["ours", "tp2"], precision, {"ours": 2, "tp2": 1}, steps)
            ratio = found["ours"]["seconds"] / found["tp2"]["seconds"]
            print(f"  tp=2 with one thread each: {found['tp2']['tokens_per_second']:.0f} tokens/s, {ratio:.2f} of one process")
            results[f"{precision}, tp2"] = found
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
