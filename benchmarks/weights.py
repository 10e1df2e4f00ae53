"""What the stages of weights cost, as real processes on a Llama of about 1.5 GB: peak memory, and time against `cp -r`.

    python benchmarks/weights.py            five rounds, some minutes, about 15 GB of disk
    python benchmarks/weights.py --quick    a model of 0.15 GB, once

A bf16 Llama (hidden 2048, 16 layers, grouped-query attention) of random numbers is made on the spot and goes through download.
Then, a round after the other: `cp -r` of the bytes that a stage reads, and the stage, with its result of the round before gone
and everything that is read in the page cache. The figures of each are the medians of its rounds.

    convert    the Hugging Face folder to canonical weights: hard links, as it is canonical already
    copied     the same where the canonical form has to be written: config.json asks for rows for added tokens
    shard      canonical weights to tp 2 · pp 2
    merge      a training checkpoint to canonical weights: fp32 masters of tp 2 · pp 1 · dp 2, so twice the bytes. Its moments
               are left out: they would be hashed like the rest, and copied by cp like the rest, but never read
    export     canonical weights to a Hugging Face folder. Its files only: the gate, which runs two models, and the samples are
               the models' time and memory, not those of the weights

`start` is a process that imports PyTorch and ends. Required: at most 600 MB of memory at the peak, and at most start + 2 × cp
of wall time, hashing included. Of these stages only merge imports PyTorch, to round; what a stage needs itself to start is
`own`. cp does not wait for the disk; a stage does (fsync), and that is in its time. CPU seconds are those of all threads.

Before each process nothing runs for some seconds: a virtual machine gives memory that is freed back to its host, and has to ask
for it again, so that a process is faster when another has just freed what it takes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages import runtime  # noqa: E402
from stages.context import Context  # noqa: E402
from stages.contracts import artifacts as a  # noqa: E402
from stages.contracts.config import ExportSettings, ModelSettings  # noqa: E402
from stages.contracts.specs import (  # noqa: E402
    ConvertSpec,
    DownloadModelSpec,
    ExportSpec,
    MergeSpec,
    Ref,
    ShardSpec,
    Spec,
    TrainSpec,
)
from stages.contracts.train_settings import LayoutSettings, TrainSettings  # noqa: E402
from stages.export_weights import write_weights  # noqa: E402

MEMORY, TIMES_CP = 600e6, 2  # required
HF = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 4864, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QUICK = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2432, "num_hidden_layers": 6}
TP, PP = 2, 2
PAUSE_SECONDS = 3  # before each process, see above


# ── Inputs: made in a process of their own, as they need PyTorch ────────────────────────────────────────────────────────────


def make_inputs(folder: Path, is_quick: bool) -> None:
    """A Hugging Face folder, and the artifact of a training checkpoint of the same model."""
    import torch
    from safetensors.torch import save_file

    from megatron_core_impl.checkpoint.sharded import write_index, write_rank_file
    from megatron_core_impl.checkpoint.slicing import stored_slices
    from megatron_core_impl.config import Layout
    from megatron_core_impl.models import families

    hf = HF | (QUICK if is_quick else {})
    source = folder / "source"
    source.mkdir(parents=True)
    config = families.config_from_hf(hf)
    specs, random = families.tensors(config), torch.Generator().manual_seed(0)
    tensors = {spec.name: (torch.randn(spec.shape, generator=random) * 0.02).bfloat16() for spec in specs}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(hf))
    write_tokenizer(source / "tokenizer.json", config.vocab_size)

    def train(spec: TrainSpec, ctx: Context) -> a.CheckpointArtifact:
        layout = Layout(tp=2, dp=2)
        step = ctx.scratch / "checkpoints" / "step-000002"
        step.mkdir(parents=True)
        for rank in range(layout.world_size):
            held = stored_slices(specs, config.num_hidden_layers, layout, rank)
            write_rank_file(
                step, rank,
                ((n, tensors[n].shape, cut, tensors[n][tuple(slice(*c) for c in cut)].float()) for n, cut in held.items()),
            )  # fmt: skip
        write_index(step, layout=asdict(layout), step=2)
        facts = a.ModelFacts(**vars(config), dtype="bfloat16", parameters=families.count_parameters(config))
        tokenizer = a.TokenizerFacts(kind="huggingface", vocab_size=config.vocab_size, eod_id=2, bos_id=1, fingerprint="0")
        return ctx.artifact(
            a.CheckpointArtifact, figure="", model=facts, tokenizer=tokenizer, checkpoint="checkpoints/step-000002", step=2,
            consumed_samples=2, consumed_tokens=2, tp=2, pp=1, dp=2, loss_before=5.0, loss_after=4.0,
        )  # fmt: skip

    runtime.execute(TrainSpec(workspace=str(folder), layout=LayoutSettings(), settings=TrainSettings(steps=2)), train)


def write_tokenizer(file: Path, vocab_size: int) -> None:
    """A tokenizer of as many words as the model has rows, so that a further token needs a further row."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(file))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(settings))


def export(spec: ExportSpec, ctx: Context) -> a.ExportArtifact:
    """The part of stages.export that writes. Of the base model it reads small files; gate and samples read its weights."""
    base = ctx.facts("model", a.ModelArtifact)
    base_folder = base.folder(ctx.workspace)
    weights, weights_folder = ctx.input("weights", a.WeightsArtifact, is_checked_meanwhile=True)
    folder = ctx.scratch / "model"
    folder.mkdir()
    written = write_weights(weights_folder, weights.model, folder, ctx, limit=spec.settings.shard_size)
    for name in ("config.json", *base.tokenizer_files):
        shutil.copyfile(base_folder / "files" / name, folder / name)
    return ctx.artifact(
        a.ExportArtifact, figure="", digests={f"model/{name}": digest for name, digest in written.digests.items()},
        model=weights.model, loss_before=None, loss_after=None, mean_error=0.0, source="", source_revision=None,
    )  # fmt: skip


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(command: list[str]) -> dict[str, float]:
    """Run a process: its wall time, CPU time and the most memory it had."""
    os.sync()
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output.decode()}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def measure_cp(source: Path, target: Path) -> dict[str, float]:
    """Copy a folder, then wait for the disk, which is `synced`."""
    for path in source.rglob("*"):
        if path.is_file():
            path.read_bytes() if path.stat().st_size < 1 << 20 else read_through(path)
    found = measure(["cp", "-r", str(source), str(target)])
    start = time.perf_counter()
    os.sync()
    found["synced"] = found["wall"] + time.perf_counter() - start
    shutil.rmtree(target)
    return found


def read_through(path: Path) -> None:
    """Have a file in the page cache."""
    block = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def stage_command(spec: Spec, folder: Path, name: str) -> list[str]:
    """The command that does a spec."""
    file = folder / f"{name}.json"
    file.write_text(spec.model_dump_json())
    if isinstance(spec, ExportSpec):
        return [sys.executable, __file__, "--export", str(file)]
    return [sys.executable, "-m", f"stages.{spec.STAGE}", str(file)]


def result_of(spec: Spec) -> a.Artifact:
    return a.load_artifact(spec.folder)


def specs_of(folder: Path) -> dict[str, tuple[Spec, Path]]:
    """Every stage that is measured, and the folder whose bytes it reads. Runs what comes before each."""
    workspace = str(folder)

    def do(spec: Spec) -> Ref:
        measure(stage_command(spec, folder, spec.NODE))
        return Ref.to(result_of(spec))

    model = do(DownloadModelSpec(workspace=workspace, model=ModelSettings(source=str(folder / "source"))))
    convert = ConvertSpec(workspace=workspace, inputs={"model": model})
    copied = ConvertSpec(workspace=workspace, inputs={"model": model}, added_tokens=("<|im_start|>", "<|im_end|>"))
    weights = do(convert)
    shard = ShardSpec(workspace=workspace, inputs={"weights": weights}, tp=TP, pp=PP)
    checkpoint = next(path for path in (folder / "train").iterdir() if path.is_dir())
    merge = MergeSpec(workspace=workspace, inputs={"checkpoint": Ref.to(a.load_artifact(checkpoint))})
    merged = do(merge)
    export = ExportSpec(workspace=workspace, inputs={"model": model, "weights": merged}, settings=ExportSettings())
    files = folder / model.path / "files"
    return {
        "convert": (convert, files), "copied": (copied, files), "shard": (shard, folder / weights.path),
        "merge": (merge, checkpoint), "export": (export, folder / merged.path),
    }  # fmt: skip


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    start, own = results["start"], results["own"]
    print(f"start of a process with PyTorch: {start['wall']:.2f} s, {start['peak_bytes'] / 1e6:.0f} MB")
    print(f"start of a stage: {own['wall']:.2f} s, {own['peak_bytes'] / 1e6:.0f} MB")
    print(
        f"{'':8}  {'bytes':>7}  {'cp -r':>7}  {'+ sync':>7}  {'stage':>7}  {'allowed':>7}  {'× cp':>5}  {'CPU':>6}  {'peak':>7}"
    )
    for name, found in results["stages"].items():
        stage, cp = found["stage"], found["cp"]
        print(
            f"{name:8}  {found['bytes'] / 1e9:4.2f} GB  {cp['wall']:5.2f} s  {cp['synced']:5.2f} s  {stage['wall']:5.2f} s  "
            f"{found['allowed']:5.2f} s  {found['times_cp']:5.2f}  {stage['cpu']:4.1f} s  {stage['peak_bytes'] / 1e6:4.0f} MB  "
            f"{'ok' if found['is_met'] else 'MISSED'}"
        )


def run(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure everything, in turns."""
    turns: dict[str, dict[str, list[dict[str, float]]]] = {}
    starts, owns = [], []
    specs = specs_of(folder)
    for _ in range(rounds):
        starts.append(measure([sys.executable, "-c", "import torch, stages.reshaping, stages.runtime"]))
        owns.append(measure([sys.executable, "-c", "import stages.reshaping, stages.runtime"]))
        for name, (spec, source) in specs.items():
            side = turns.setdefault(name, {"cp": [], "stage": []})
            side["cp"].append(measure_cp(source, folder / "copy"))
            kept = spec.folder.with_name("kept")
            if spec.folder.exists():
                spec.folder.rename(kept)  # the next stage reads it
            side["stage"].append(measure(stage_command(spec, folder, name)))
            shutil.rmtree(kept, ignore_errors=True)
    start = medians(starts)
    found = {}
    for name, (_, source) in specs.items():
        cp, stage = medians(turns[name]["cp"]), medians(turns[name]["stage"])
        allowed = start["wall"] + TIMES_CP * cp["wall"]
        found[name] = {
            "bytes": sum(path.stat().st_size for path in source.rglob("*") if path.is_file()),
            "cp": cp, "stage": stage, "allowed": allowed, "times_cp": (stage["wall"] - start["wall"]) / cp["wall"],
            "is_met": stage["wall"] <= allowed and stage["peak_bytes"] <= MEMORY, "rounds": turns[name],
        }  # fmt: skip
    return {"start": start, "own": medians(owns), "stages": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, once")
    parser.add_argument("--rounds", type=int, help="rounds of each side [5; 1 with --quick]")
    parser.add_argument("--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "weights.json", help="the JSON file")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_inputs(options.make, options.quick)
        return
    if options.export:
        sys.argv = [sys.argv[0], str(options.export)]
        runtime.main("export", export, __doc__)
    folder = options.output.parent.resolve() / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, __file__, "--make", str(folder), *(["--quick"] if options.quick else [])], check=True)
        results = run(folder, options.rounds or (1 if options.quick else 5))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(results)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
