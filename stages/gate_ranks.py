"""Our side of the gate: the model on the ranks of its layout, against what transformers has computed.

A layout of one rank runs in the stage's own process. Otherwise its ranks are processes, started as training starts its own:
through torchrun, over NCCL with a GPU each, or over gloo. So what is compared is the code that trains, its collectives,
schedules and messages included, under the topology that trains. (Replicas, dp, all compute the same: there is one.)
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_core_impl.config import Layout, ModelConfig, RopeScaling
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.parity.compare import compare
from megatron_core_impl.parity.expected import Expected
from megatron_core_impl.parity.figures import Part
from megatron_core_impl.parity.probes import Batch
from stages import torchrun
from stages.both_models import Precision, device, load_ours
from stages.context import Context
from stages.outcomes import BadInput, Interrupted, StageError

JOB = "job.json"
LOG = "workers.log"


def run_ours(
    ctx: Context, config: ModelConfig, weights: Path, layout: Layout, precision: Precision,
    *, batches: Sequence[Batch], folder: Path,
) -> list[Part]:  # fmt: skip
    """Run our model, and return what all ranks have found.

    Args:
        weights: folder of weights in any form.
        folder: where the reference's activations are; gets what the ranks are told and find.

    Raises:
        BadInput: the weights are not those of this model, or the machine has too few GPUs.
        StageError: a rank ran out of memory, or crashed.
    """
    if layout.world_size == 1:
        model = load_ours(config, weights, precision, Mesh.single(device()))
        return compare(model, batches, Expected(folder), lambda number, batch: _progress(ctx, number, len(batches), batch.name))
    job = {"config": asdict(config), "weights": str(weights), "layout": asdict(layout), "precision": precision,
           "batches": [batch.name for batch in batches]}  # fmt: skip
    (folder / JOB).write_text(json.dumps(job))
    for number, batch in enumerate(batches):
        np.save(_batch_file(folder, number), np.stack([values.numpy() for values in _values(batch)]))

    def on_event(event: torchrun.Event) -> None:
        match event:
            case {"event": "progress", "number": number, "name": name}:
                _progress(ctx, number, len(batches), name)

    outcome = torchrun.run_workers(
        "stages.gate_ranks", [str(folder)], processes=layout.world_size, log=folder / LOG, on_event=on_event
    )
    files = [_part_file(folder, rank) for rank in range(layout.world_size)]
    if outcome.returncode or not all(file.is_file() for file in files):
        raise _failure(outcome, folder / LOG)
    return [Part.from_json(values) for file in files for values in json.loads(file.read_text())]


def _progress(ctx: Context, number: int, total: int, name: str) -> None:
    ctx.progress(number, total, f"our model: {name}")


def _values(batch: Batch) -> tuple[torch.Tensor, ...]:
    mask, is_compared = batch.mask.long(), batch.is_compared.long()
    return batch.tokens, batch.labels, batch.position_ids, mask, is_compared


def _batch_file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number}.npy"


def _part_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _failure(outcome: torchrun.Outcome, log: Path) -> BaseException:
    """What to raise when a rank has not finished."""
    printed = log.read_text(errors="replace") if log.is_file() else ""
    less = "lower verify.batch_size or verify.sequence_length, or set verify.precision to bf16"
    if outcome.killed is not None and outcome.killed[1] == signal.SIGKILL:
        return StageError(f"rank {outcome.killed[0]} was killed by the kernel (out of memory?): {less}")
    if outcome.errors:
        match outcome.errors[0]:
            case {"kind": "bad-input", "message": message}:
                return BadInput(message)
            case {"kind": "memory", "rank": rank}:
                return StageError(f"rank {rank} ran out of memory: {less}")
            case {"kind": "system", "errno": number, "message": message, "file": file}:
                return OSError(number, message, file or str(log.parent))
            case {"rank": rank, "message": message, "trace": trace}:
                print(trace, file=sys.stderr, flush=True)
                return torchrun.WorkerCrashed(f"rank {rank}: {message}. This is a defect of ours; its log has the traceback")
    if outcome.is_stopped:
        return Interrupted("stopped; run it again")
    print(printed, file=sys.stderr, flush=True)  # the file goes with the scratch folder
    return torchrun.WorkerCrashed(f"the ranks ended (torchrun: {outcome.returncode}); what they printed is above")


# ── In a rank's process ─────────────────────────────────────────────────────────────────────────────────────────────────────


def work(folder: Path) -> int:
    """A rank's life: compare, and write down what it finds. Returns the exit code."""
    torchrun.join()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save
    try:
        _compare(folder)
    except BaseException as error:
        traceback.print_exc()  # into the log
        torchrun.tell("error", **torchrun.meaning(error), trace=traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # at once: other ranks may wait for this one
    return 0


def _compare(folder: Path) -> None:
    job: dict[str, Any] = json.loads((folder / JOB).read_text())
    layout, config = Layout(**job["layout"]), _config(job["config"])
    torch.set_float32_matmul_precision("highest")
    mesh = init_mesh(layout, torchrun.join_group(), kv_replicas=layout.kv_replicas(config))
    model = load_ours(config, Path(job["weights"]), job["precision"], mesh)
    batches = []
    for number, name in enumerate(job["batches"]):
        tokens, labels, position_ids, mask, is_compared = torch.from_numpy(np.load(_batch_file(folder, number)))
        batches.append(Batch(name, tokens, labels, position_ids, mask.bool(), is_compared.bool()))

    def progress(number: int, batch: Batch) -> None:
        if mesh.rank == 0:
            torchrun.tell("progress", number=number, name=batch.name)

    found = compare(model, batches, Expected(folder), progress)
    _part_file(folder, mesh.rank).write_text(json.dumps([asdict(part) for part in found]))
    torch.distributed.destroy_process_group()


def _config(values: dict[str, Any]) -> ModelConfig:
    scaling = values["rope_scaling"]
    return ModelConfig(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
