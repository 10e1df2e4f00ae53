"""Training steps on one GPU, ours and those of transformers: tokens per second, share of the GPU's rate, peak memory.

    python benchmarks/gpu_step.py              two models, some minutes
    python benchmarks/gpu_step.py --quick      fewer steps

The models are Llamas in bf16 of 1.1 B parameters (TinyLlama's shape: 22 layers, hidden 2048, 32 heads on 4 key/value heads, ffn
5632) and of 0.36 B with Llama 3's vocabulary of 128,256, where the loss weighs more. A step is one micro batch. Each side runs
in a process of its own, one after the other, twice in turns; the figure is the median step of the better turn.

What is compared:
    ours          the trainer's step: fused output layer and loss, gradients summed in fp32, clipping, AdamW on fp32 masters.
    compiled      the same with norms, rotation and activation compiled.
    packed        ours, where every row is a few documents of its own, with attention inside each.
    transformers  LlamaForCausalLM (SDPA), its own loss, clip_grad_norm_, torch's fused AdamW, all in bf16, moments too: it
                  moves far fewer bytes in the optimizer, and rounds away what is small beside a weight.

The rate is that of a large product of matrices on this GPU, measured beside; operations are counted as in train_step.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "1.1B": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "ffn": 5632, "vocabulary": 32000, "batch": 4},
    "0.36B, large vocabulary": {
        "hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocabulary": 128256, "batch": 8,
    },
}  # fmt: skip
LENGTH = 2048
SIDES = ("ours", "compiled", "packed", "transformers")
Step = Callable[[], None]


def flops(model: dict[str, int]) -> float:
    """Of a step: 2 per weight and token in the forward pass, twice that in the backward pass; causal attention counts half."""
    hidden, layers = model["hidden"], model["layers"]
    kv = hidden * model["kv_heads"] // model["heads"]
    weights = layers * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * model["ffn"]) + model["vocabulary"] * hidden
    attention = layers * 2 * LENGTH * hidden / 2
    return 6.0 * model["batch"] * LENGTH * (weights + attention)


def config_of(model: dict[str, int]) -> Any:
    from megatron_core_impl.config import ModelConfig

    return ModelConfig(
        family="llama", vocab_size=model["vocabulary"], hidden_size=model["hidden"], intermediate_size=model["ffn"],
        num_hidden_layers=model["layers"], num_attention_heads=model["heads"], num_key_value_heads=model["kv_heads"],
        head_dim=model["hidden"] // model["heads"], max_position_embeddings=LENGTH,
    )  # fmt: skip


def estimated_bytes(model: dict[str, int]) -> int:
    """What `memory` expects of a step of ours."""
    from megatron_core_impl.config import Layout
    from megatron_core_impl.memory import estimate

    found = estimate(
        config_of(model), Layout(),
        precision="bf16", micro_batch_size=model["batch"], sequence_length=LENGTH, num_microbatches=1,
    )  # fmt: skip
    return found.total


def ours(model: dict[str, int], side: str) -> Step:
    import torch

    from megatron_core_impl.loss_scale import StaticLossScale
    from megatron_core_impl.mesh import Mesh
    from megatron_core_impl.models.transformer import MicroBatch
    from megatron_core_impl.optim import OptimizerSettings
    from megatron_core_impl.parallel.compile import compile_layers
    from megatron_core_impl.parallel.parallelize import parallelize
    from megatron_core_impl.parallel.pipeline import Pipeline
    from megatron_core_impl.parallel.zero import ZeroOptimizer
    from megatron_core_impl.train_config import Rates
    from megatron_core_impl.train_step import train_step

    mesh = Mesh.single("cuda")
    module = parallelize(config_of(model), mesh, dtype=torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    if side == "compiled":
        compile_layers(module, torch.arange(LENGTH, device="cuda"), model["batch"])
    optimizer, pipeline = ZeroOptimizer(module, mesh, OptimizerSettings()), Pipeline(module)
    torch.manual_seed(0)
    tokens = torch.randint(model["vocabulary"], (model["batch"], LENGTH + 1), device="cuda")
    rows = (300, 20, 700, 28, 1000) * model["batch"] if side == "packed" else None
    weights = torch.ones(model["batch"], LENGTH, device="cuda")
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], weights, document_lengths=rows)

    def step() -> None:
        train_step(pipeline, optimizer, [batch], Rates(1e-4, 0.1), StaticLossScale())

    return step


def transformers(model: dict[str, int]) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model["vocabulary"], hidden_size=model["hidden"], intermediate_size=model["ffn"],
        num_hidden_layers=model["layers"], num_attention_heads=model["heads"], num_key_value_heads=model["kv_heads"],
        max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        module = LlamaForCausalLM(config).to(torch.bfloat16)
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    tokens = torch.randint(model["vocabulary"], (model["batch"], LENGTH), device="cuda")

    def step() -> None:
        module(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def rate() -> float:
    """Operations per second of a large product in bf16."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    times = []
    for _ in range(20):
        times.append(_seconds(lambda: torch.mm(a, b)))
    return 2 * 8192**3 / statistics.median(times[5:])


def _seconds(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def serve(name: str, side: str, steps: int) -> dict[str, float]:
    """The life of a measured process."""
    import torch

    if side == "rate":
        return {"rate": rate()}
    model = MODELS[name]
    begun = time.perf_counter()
    step = transformers(model) if side == "transformers" else ours(model, side)
    step()
    ready = time.perf_counter() - begun
    times = [_seconds(step) for _ in range(3 + steps)][3:]
    return {"seconds": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated(), "ready_seconds": ready}


def measure(name: str, side: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--serve", name, side, str(steps)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=_environment(), check=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one turn")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "gpu_step.json", help="the JSON file"
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, side, steps = options.serve
        print(json.dumps(serve(name, side, int(steps))))
        return
    import torch

    sys.path.insert(0, str(ROOT))
    peak = measure("", "rate", 0)["rate"]
    device = torch.cuda.get_device_name()
    print(f"{device}, PyTorch {torch.__version__}; a product of 8192³ in bf16: {peak / 1e12:.0f} TFLOP/s", flush=True)
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "rate": peak}
    for name, model in MODELS.items():
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(1 if options.quick else 2):
            for side, found in turns.items():
                found.append(measure(name, side, 5 if options.quick else 15))
        best = {side: min(found, key=lambda turn: turn["seconds"]) for side, found in turns.items()}
        tokens = model["batch"] * LENGTH
        print(
            f"\n{name}: a step of {model['batch']} × {LENGTH} tokens, {flops(model) / 1e12:.0f} TFLOP; "
            f"memory is estimated at {estimated_bytes(model) / 1e9:.1f} GB"
        )
        for side, turn in best.items():
            faster = best["transformers"]["seconds"] / turn["seconds"]
            print(
                f"  {side:<14}{tokens / turn['seconds']:9,.0f} tokens/s  {1e3 * turn['seconds']:6.1f} ms  "
                f"{flops(model) / turn['seconds'] / peak:5.1%} of the rate  {turn['peak_bytes'] / 1e9:5.1f} GB  "
                f"{faster:.2f} × transformers  ready in {turn['ready_seconds']:.0f} s",
                flush=True,
            )
        results[name] = best
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
