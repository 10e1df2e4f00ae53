"""How training stops and goes on: its state, saved as a checkpoint and found again.

Every rank writes the pieces that it owns of masters and moments, cut over tp, pp and dp; together they tile the global tensors,
so whoever goes on may have any other layout. The order of data and the random numbers of dropout follow from the number of the
step, so a few counters are the rest.
"""

import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.checkpoint.digests import FileDigest
from megatron_core_impl.checkpoint.sharded import open_weights, write_index, write_rank_file
from megatron_core_impl.collectives import all_reduce_
from megatron_core_impl.loss_scale import LossScale
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Report
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.compile import compile_layers
from megatron_core_impl.parallel.parallelize import parallelize
from megatron_core_impl.parallel.zero import ZeroOptimizer
from megatron_core_impl.train_config import Job, TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(kw_only=True)
class State:
    """How far training is. All of it is in a checkpoint."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0  # that count: labels with a weight above 0, of all steps
    skipped_steps: int = 0  # whose gradient was not finite
    skipped_in_a_row: int = 0  # of these, the last ones
    loss_scale: dict[str, float] = field(default_factory=dict)
    loss_before: float | None = None  # on the valid split, before the first step
    loss_after: float | None = None  # after the last
    loss_test: float | None = None  # on the test split, after the last step; None too where there is no such split


def begin(job: Job, mesh: Mesh, report: Report) -> tuple[Transformer, ZeroOptimizer, LossScale, State]:
    """Model, optimizer, loss scale and state: of the newest intact checkpoint, else of the weights to start from.

    Raises:
        ValueError: the layout cannot share out the model or the batches, the attention kernel cannot compute here, or the
            checkpoint was made with other settings.
    """
    config = job.config
    config.check_layout(mesh.layout)
    if mesh.rank == 0:
        report.progress(0, config.steps, "loading")
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_unfinished(job.checkpoints)
    record = newest_intact(job, mesh, report)
    model = parallelize(
        job.model, mesh,
        dtype=DTYPES[config.precision], dropout=config.dropout_settings, recompute=config.recompute_settings,
        kernel=config.kernel,
    )  # fmt: skip
    if config.compile:
        _compile(model, config, report)
    optimizer = ZeroOptimizer(model, mesh, config.optimizer_settings)
    loss_scale = config.new_loss_scale()
    if record is None:
        optimizer.load_masters(open_weights(job.weights))  # in full precision, and through them the model
        return model, optimizer, loss_scale, State()
    folder = checkpoints.step_folder(job.checkpoints, record["step"])
    _refuse_differences(folder, record["must_agree"], job.must_agree())
    optimizer.load(open_weights(folder))
    optimizer.step_count = record["optimizer_steps"]
    loss_scale.load_state(record["loss_scale"])
    if mesh.rank == 0:
        report.log(f"going on from the checkpoint at step {record['step']}")
        report.progress(record["step"], config.steps, f"step {record['step']}/{config.steps}")
    return model, optimizer, loss_scale, State(**{field.name: record[field.name] for field in fields(State)})


def _compile(model: Transformer, config: TrainConfig, report: Report) -> None:
    shape = (config.micro_batch_size, config.sequence_length) if config.reset_position_ids else (config.sequence_length,)
    positions = torch.arange(config.sequence_length, device=model.mesh.device).expand(shape)
    seconds = compile_layers(model, positions, config.micro_batch_size)
    if model.mesh.rank == 0:
        report.log(f"compiled the layers in {seconds:.0f} s")


def save(job: Job, mesh: Mesh, optimizer: ZeroOptimizer, loss_scale: LossScale, state: State) -> None:
    """Write a checkpoint: every rank its file, rank 0 the index and the state, and then the name that makes it count.

    The digest of a file is taken by the rank that writes it, while it is written.
    """
    folder = checkpoints.unfinished_folder(job.checkpoints, state.step)
    if mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _barrier(mesh)
    own = write_rank_file(folder, mesh.rank, optimizer.named_pieces())
    digests = torch.zeros(mesh.layout.world_size, 1 + 32, dtype=torch.int64)  # size, and the bytes of the digest
    digests[mesh.rank] = torch.tensor([own.size, *bytes.fromhex(own.blake3)])
    digests = all_reduce_(digests.to(mesh.device), mesh.world_group).cpu()  # also: all have written
    if mesh.rank == 0:
        found = {
            _rank_file(rank): FileDigest(size, bytes(digest).hex()) for rank, (size, *digest) in enumerate(digests.tolist())
        }
        write_index(folder, found, layout=asdict(mesh.layout), step=state.step)
        state.loss_scale = loss_scale.state()
        record = asdict(state) | {
            "optimizer_steps": optimizer.step_count,
            "layout": asdict(mesh.layout),
            "must_agree": job.must_agree(),
        }
        checkpoints.commit(job.checkpoints, state.step, record, keep=job.config.keep_checkpoints)


def newest_intact(job: Job, mesh: Mesh, report: Report) -> dict[str, Any] | None:
    """The state of the newest checkpoint whose files are what was written. Damaged ones on the way there are removed.

    The ranks share the files of a checkpoint among them, and agree on each checkpoint before the next is looked at.
    """
    steps = checkpoints.finished_steps(job.checkpoints) if job.checkpoints.is_dir() else []
    _barrier(mesh)  # all have the same list, before one of them removes something
    for step in steps:
        folder, record, damage = checkpoints.step_folder(job.checkpoints, step), None, ""
        try:
            record = checkpoints.read_state(folder)
            files = checkpoints.recorded_files(folder, record)
            mine = sorted(files)[mesh.rank :: mesh.layout.world_size]
            checkpoints.check_files(folder, {name: files[name] for name in mine})
        except checkpoints.DamagedCheckpoint as error:
            damage = str(error)
        if not any_says(bool(damage), mesh):
            return record
        if damage and (record is not None or mesh.rank == 0):  # an unreadable state is seen by all, and told once
            report.warn(f"the checkpoint at step {step} is damaged and is not used: {damage}")
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def any_says(flag: bool, mesh: Mesh) -> bool:
    """Whether any process says yes: the same answer everywhere."""
    return bool(all_reduce_(torch.tensor(int(flag), device=mesh.device), mesh.world_group).item())


def _refuse_differences(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name}={then.get(name)!r}, now it is {value!r}: give the same again, or start anew "
                "in another folder"
            )


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _barrier(mesh: Mesh) -> None:
    """Wait for all processes."""
    any_says(False, mesh)
