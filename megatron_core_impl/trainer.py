"""The training loop, as a story: data, model, state, then step after step until the last one, or until asked to stop.

One step is one optimizer update over a global batch. The tokens of the whole batch are counted before its first forward, so
every micro batch contributes sum(loss) / N and all reductions are sums: the result does not depend on how the batch is cut
into micro batches, nor on the layout.

The order of the data is a pure function of (seed, samples consumed), and a checkpoint holds master weights, moments and a few
counters. So training that stops and goes on computes what it would have computed: bit for bit under the same layout, and up
to the order of sums under any other.

Shapes: B sequences of a micro batch, S tokens of each.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.checkpoint.sharded import open_weights, write_index, write_rank_file
from megatron_core_impl.collectives import all_reduce_
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.data.gpt_dataset import GPTDataset, split_documents
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.sampler import step_samples
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Journal, Report
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.optim import Schedule, lr_at
from megatron_core_impl.parallel.parallelize import parallelize
from megatron_core_impl.parallel.zero import ZeroOptimizer

CHECKPOINTS_FOLDER = "checkpoints"
MAX_SKIPPED_IN_A_ROW = 10
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train, in optimizer steps."""

    steps: int
    sequence_length: int  # tokens of a sample that are predicted; it reads one more
    micro_batch_size: int
    global_batch_size: int
    optimizer: Literal["adamw"] = "adamw"
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    decay_steps: int | None = None  # None: steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_grad: float = 1.0  # 0: no clipping
    precision: Literal["bf16", "fp32", "fp64"] = "fp32"  # of the model; masters and moments are fp32 (fp64 in fp64)
    seed: int = 1234
    split: str = "969,30,1"  # shares of train, valid, test documents
    eval_interval: int = 100
    eval_batches: int = 4  # global batches of the valid split, the same ones each time
    checkpoint_interval: int = 100
    keep_checkpoints: int = 2
    log_interval: int = 10

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1. A skipped step does not hold the schedule up."""
        return lr_at(
            step, lr=self.lr, min_lr=self.min_lr, warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps or self.steps, schedule=self.schedule,
        )  # fmt: skip


# What may differ between a run and the one that goes on from its checkpoint: how the work is shared out, and what is told.
MAY_CHANGE = {"micro_batch_size", "eval_interval", "checkpoint_interval", "keep_checkpoints", "log_interval"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where the results go."""

    config: TrainConfig
    model: ModelConfig
    weights: Path  # folder of the weights to start from, in any form that `open_weights` reads
    dataset: Path  # prefix of the .bin and .idx files
    dataset_fingerprint: str
    folder: Path  # gets checkpoints/, metrics.jsonl, tensorboard/

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS_FOLDER

    def must_agree(self) -> dict[str, Any]:
        """What a checkpoint was made with, and whoever goes on from it must have too. JSON values."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in MAY_CHANGE}
        return settings | {"model": asdict(self.model), "dataset": self.dataset_fingerprint}


@dataclass(kw_only=True)
class State:
    """How far training is. All of it is in a checkpoint."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0  # whose gradient was not finite
    loss_before: float | None = None  # on the valid split, before the first step
    loss_after: float | None = None  # after the last


class TrainingDiverged(RuntimeError):
    """The numbers are no longer finite. The message says what to change."""


class Batch(NamedTuple):
    """One micro batch."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64
    weights: Tensor  # [B, S] 1 where a token counts, else 0


def train(job: Job, mesh: Mesh, *, report: Report | None = None, should_stop: Callable[[], bool] = lambda: False) -> State:
    """Train to the last step, going on from the newest intact checkpoint in the job's folder if there is one.

    Every process of the mesh calls it. `should_stop` is asked before every step; when any process says yes, all finish with a
    checkpoint of what is done.

    Returns:
        The state at the end; `step` is less than `config.steps` when stopped, and then `loss_after` is None.

    Raises:
        ValueError: the checkpoint was made with other settings, or the data does not fit them.
        TrainingDiverged: too many steps in a row had no finite gradient, or the held-out loss is not finite.
    """
    config = job.config
    report = report or Report()
    train_data, valid_data = _datasets(job)
    model, optimizer, state = _begin(job, mesh, report)
    saved_step, skipped_in_a_row = state.step, 0
    with Journal(
        job.folder if mesh.rank == 0 else None,
        report, steps=config.steps, log_interval=config.log_interval, resume_step=state.step,
    ) as journal:  # fmt: skip
        if state.loss_before is None:
            state.loss_before = evaluate(model, valid_data, config, mesh)
            journal.evaluation(0, state.loss_before)
            _require_finite(
                state.loss_before, "before the first step: the weights to start from are damaged, or not this model's"
            )
        while state.step < config.steps and not _any(should_stop(), mesh):
            started = time.perf_counter()
            batches = _batches(train_data, state.consumed_samples, config, mesh)
            lr = config.learning_rate(state.step + 1)
            loss, tokens, grad_norm = train_step(model, optimizer, batches, mesh, lr=lr)
            state.step += 1
            state.consumed_samples += config.global_batch_size
            state.consumed_tokens += tokens
            journal.step(
                state.step, loss=loss, tokens=tokens, seconds=time.perf_counter() - started, lr=lr, grad_norm=grad_norm
            )
            is_skipped = not math.isfinite(grad_norm)
            state.skipped_steps += is_skipped
            skipped_in_a_row = skipped_in_a_row + 1 if is_skipped else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(_diverged(state.step, config, job.checkpoints))

            is_last = state.step == config.steps
            if is_last or state.step % config.eval_interval == 0:
                held_out = evaluate(model, valid_data, config, mesh)
                journal.evaluation(state.step, held_out)
                if is_last:
                    _require_finite(held_out, f"after {state.step} steps: lower lr (now {config.lr:g}) or raise warmup_steps")
                    state.loss_after = held_out
            if is_last or state.step % config.checkpoint_interval == 0:
                save(job, mesh, optimizer, state)
                saved_step = state.step
    if state.step > saved_step:
        save(job, mesh, optimizer, state)
    return state


def train_step(
    model: Transformer, optimizer: ZeroOptimizer, batches: Sequence[Batch], mesh: Mesh, *, lr: float
) -> tuple[float, int, float]:
    """One optimizer update over this replica's micro batches of the global batch.

    Returns:
        Mean loss over the tokens of the global batch, how many these are, and the norm of the gradient: nan where that was not
        finite, and then the optimizer left everything as it was.
    """
    tokens = all_reduce_(torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches]).sum(), mesh.dp_group)
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    optimizer.begin_step()
    for batch in batches:
        share = model.loss(batch.tokens, batch.labels, batch.weights) / tokens.clamp(min=1)  # a batch may have no target
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    try:
        grad_norm = optimizer.step(lr)
    except FloatingPointError:
        grad_norm = math.nan
    mean_loss, num_tokens = torch.stack([all_reduce_(loss, mesh.dp_group), tokens]).tolist()
    return mean_loss, int(num_tokens), grad_norm


@torch.no_grad()
def evaluate(model: Transformer, data: GPTDataset, config: TrainConfig, mesh: Mesh) -> float:
    """Mean loss over the tokens of the first `eval_batches` global batches of a dataset: the same ones at every call."""
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # sum of losses, tokens
    for number in range(config.eval_batches):
        for batch in _batches(data, number * config.global_batch_size, config, mesh):
            totals[0] += model.loss(batch.tokens, batch.labels, batch.weights)
            totals[1] += batch.weights.sum()
    loss_sum, tokens = all_reduce_(totals, mesh.dp_group).tolist()
    return float(loss_sum / tokens)


def save(job: Job, mesh: Mesh, optimizer: ZeroOptimizer, state: State) -> None:
    """Write a checkpoint: every rank its file, rank 0 the index and the state, and then the name that makes it count.

    The digest of a file is taken by the rank that wrote it, while it is in memory.
    """
    folder = checkpoints.unfinished_folder(job.checkpoints, state.step)
    if mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _barrier(mesh)
    write_rank_file(folder, mesh.rank, optimizer.named_pieces())
    digests = torch.zeros(mesh.layout.world_size, 32, dtype=torch.int64)
    own = np.frombuffer(checkpoints.file_digest(folder / _rank_file(mesh.rank)), np.uint8)
    digests[mesh.rank] = torch.from_numpy(own.astype(np.int64))
    digests = all_reduce_(digests.to(mesh.device), mesh.world_group).cpu()  # also: all have written
    if mesh.rank == 0:
        write_index(folder, layout=asdict(mesh.layout), step=state.step)
        found = {_rank_file(rank): bytes(digest.tolist()) for rank, digest in enumerate(digests)}
        found["index.json"] = checkpoints.file_digest(folder / "index.json")
        files = {name: {"size": (folder / name).stat().st_size, "sha256": digest.hex()} for name, digest in found.items()}
        record = asdict(state) | {
            "optimizer_steps": optimizer.step_count,
            "layout": asdict(mesh.layout),
            "must_agree": job.must_agree(),
            "files": files,
        }
        checkpoints.commit(job.checkpoints, state.step, record, keep=job.config.keep_checkpoints)


def _begin(job: Job, mesh: Mesh, report: Report) -> tuple[Transformer, ZeroOptimizer, State]:
    """Model, optimizer and state: of the newest intact checkpoint, else of the weights to start from."""
    config = job.config
    if mesh.rank == 0:
        report.progress(0, config.steps, "loading")
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_unfinished(job.checkpoints)
    record = _newest_intact(job, mesh, report)
    model = parallelize(job.model, mesh, dtype=DTYPES[config.precision])
    optimizer = ZeroOptimizer(
        model, mesh,
        betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, clip_grad=config.clip_grad,
    )  # fmt: skip
    if record is None:
        optimizer.load_masters(open_weights(job.weights))  # in full precision, and through them the model
        return model, optimizer, State()
    folder = checkpoints.step_folder(job.checkpoints, record["step"])
    _refuse_differences(folder, record["must_agree"], job.must_agree())
    optimizer.load(open_weights(folder))
    optimizer.step_count = record["optimizer_steps"]
    if mesh.rank == 0:
        report.log(f"going on from the checkpoint at step {record['step']}")
        report.progress(record["step"], config.steps, f"step {record['step']}/{config.steps}")
    return model, optimizer, State(**{field.name: record[field.name] for field in fields(State)})


def _newest_intact(job: Job, mesh: Mesh, report: Report) -> dict[str, Any] | None:
    """The state of the newest checkpoint whose files are what was written. Damaged ones on the way there are removed.

    The ranks share the files of a checkpoint among them, and agree on each checkpoint before the next is looked at.
    """
    steps = checkpoints.finished_steps(job.checkpoints) if job.checkpoints.is_dir() else []
    _barrier(mesh)  # all have the same list, before one of them removes something
    for step in steps:
        folder, record, damage = checkpoints.step_folder(job.checkpoints, step), None, ""
        try:
            record = checkpoints.read_state(job.checkpoints, step)
            mine = sorted(record["files"])[mesh.rank :: mesh.layout.world_size]
            checkpoints.check_files(folder, {name: record["files"][name] for name in mine})
        except checkpoints.DamagedCheckpoint as error:
            damage = str(error)
        if not _any(bool(damage), mesh):
            return record
        if damage and (record is not None or mesh.rank == 0):  # an unreadable state is seen by all, and told once
            report.warn(f"the checkpoint at step {step} is damaged and is not used: {damage}")
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _refuse_differences(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name}={then.get(name)!r}, now it is {value!r}: give the same again, or start anew "
                "in another folder"
            )


def _datasets(job: Job) -> tuple[GPTDataset, GPTDataset]:
    """The samples of all steps, and those of an evaluation."""
    config, data = job.config, IndexedDataset(job.dataset)
    train_documents, valid_documents, _ = split_documents(config.split, len(data))

    def samples(documents: range, num_batches: int) -> GPTDataset:
        return GPTDataset(
            data, documents,
            sequence_length=config.sequence_length, num_samples=num_batches * config.global_batch_size, seed=config.seed,
        )  # fmt: skip

    return samples(train_documents, config.steps), samples(valid_documents, config.eval_batches)


def _batches(data: GPTDataset, first_sample: int, config: TrainConfig, mesh: Mesh) -> list[Batch]:
    """This replica's micro batches of the global batch that begins at a sample."""
    batches = []
    for numbers in step_samples(first_sample, config.global_batch_size, config.micro_batch_size, mesh.layout.dp, mesh.dp_rank):
        ids = torch.from_numpy(np.stack([data[k] for k in numbers])).to(mesh.device, non_blocking=True)  # [B, S + 1]
        labels = ids[:, 1:].contiguous()
        weights = torch.ones(labels.shape, dtype=DTYPES["fp64" if config.precision == "fp64" else "fp32"], device=mesh.device)
        batches.append(Batch(ids[:, :-1].contiguous(), labels, weights))
    return batches


def _diverged(step: int, config: TrainConfig, root: Path) -> str:
    last = checkpoints.finished_steps(root)
    return (
        f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last at step {step}; none of them changed "
        f"the weights. {f'The last checkpoint is step {last[0]}' if last else 'There is no checkpoint yet'}. "
        f"Lower lr (now {config.lr:g}), raise warmup_steps (now {config.warmup_steps}), or look for text that is no text"
    )


def _require_finite(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the held-out loss is {loss} {when}")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _any(flag: bool, mesh: Mesh) -> bool:
    """Whether any process says yes: the same answer everywhere."""
    return bool(all_reduce_(torch.tensor(int(flag), device=mesh.device), mesh.world_group).item())


def _barrier(mesh: Mesh) -> None:
    """Wait for all processes."""
    _any(False, mesh)
