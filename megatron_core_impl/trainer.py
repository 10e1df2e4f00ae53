"""The training loop, as a story: data, model, state, then step after step until the last one, or until asked to stop.

One step is one optimizer update over a global batch (`train_step`). The result does not depend on how the batch is cut into
micro batches, nor on the layout. The order of the data is a pure function of (seed, samples consumed), and a checkpoint holds
master weights, moments and a few counters (`resume`). So training that stops and goes on computes what it would have computed:
bit for bit on CPUs under the same layout, and up to the order of sums under any other, or on GPUs.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_core_impl.batches import evaluation_batches, on_device, training_batches
from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.collectives import all_reduce_
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.host_memory import peak_bytes
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Journal, Report, Sums, total
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.random import seed_step
from megatron_core_impl.prefetch import Prefetched
from megatron_core_impl.resume import State, any_says, begin, save
from megatron_core_impl.train_config import EVAL_SHARE, FORWARD_SHARE, Job, TrainConfig
from megatron_core_impl.train_step import StepResult, measure, measure_sums, train_step
from megatron_core_impl.training_data import TrainingData, open_data


class TrainingDiverged(RuntimeError):
    """The numbers are no longer finite. The message says what to change."""


def train(job: Job, mesh: Mesh, *, report: Report | None = None, should_stop: Callable[[], bool] = lambda: False) -> State:
    """Train to the last step, going on from the newest intact checkpoint in the job's folder if there is one.

    Every process of the mesh calls it. Before every step, `should_stop` and, after the first, the clock are asked; when any
    process says yes, all finish with a checkpoint of what is done.

    Returns:
        The state at the end; `step` is less than `config.steps` when stopped, and then `loss_after` is None.

    Raises:
        ValueError: the checkpoint was made with other settings, or the data does not fit them.
        TrainingDiverged: too many steps in a row had no finite gradient, or the held-out loss is not finite.
    """
    config, begun = job.config, time.monotonic()
    report = report or Report()
    data = open_data(job, report.log if mesh.rank == 0 else lambda line: None)
    model, optimizer, loss_scale, state = begin(job, mesh, report)
    pipeline = Pipeline(model)
    eval_interval = config.eval_every(mesh.layout.dp)
    resumed_step = saved_step = state.step

    def must_stop() -> bool:
        limit = config.stop_after_minutes
        has_moved = state.step > resumed_step  # or a short time would never lead anywhere
        is_late = limit is not None and has_moved and time.monotonic() - begun >= 60 * limit
        if is_late and mesh.rank == 0:
            report.log(f"stop_after_minutes={limit:g} have passed")
        return any_says(is_late or should_stop(), mesh)

    journal = Journal(
        job.folder if mesh.rank == 0 else None,
        report, steps=config.steps, log_interval=config.log_interval, resume_step=state.step,
    )  # fmt: skip
    with journal, Prefetched(training_batches(data.train, job, mesh, state.consumed_samples)) as feed:
        if state.loss_before is None:
            if mesh.rank == 0:
                report.log(_evaluation_plan(data, config, mesh.layout.dp))
            held_out = _evaluate(pipeline, data.valid, job, journal, 0)
            _require_finite(held_out, "before the first step: the weights to start from are damaged, or not this model's")
            state.loss_before = held_out.mean_loss
        while state.step < config.steps and not must_stop():
            started, waited = time.perf_counter(), feed.waited
            batch_size = config.batches.size_at(state.consumed_samples)
            rates, scale = config.rates(state.consumed_samples), loss_scale.scale
            batches = on_device(next(feed), mesh.device)
            state.step += 1
            if state.step in config.skip_steps:
                result = measure(pipeline, batches, by_micro_batch=config.reference_loss_mean)
            else:
                if config.dropout_settings.is_active:
                    seed_step(config.seed, state.step, mesh)
                result = train_step(pipeline, optimizer, batches, rates, loss_scale, by_micro_batch=config.reference_loss_mean)
            state.consumed_samples += batch_size
            state.consumed_tokens += result.tokens
            journal.step(
                state.step,
                loss=result.loss,
                weight=result.weight,
                tokens=result.tokens,
                read=sum(batch.tokens.numel() for batch in batches) * mesh.layout.dp,
                seconds=time.perf_counter() - started,
                waited=feed.waited - waited,
                lr=rates.lr,
                grad_norm=result.grad_norm,
                loss_scale=scale if config.precision == "fp16" else None,
                batch_size=batch_size if config.ramp_start is not None else None,
                memory=_peak_memory(mesh) if journal.is_due(state.step) else None,
            )
            _count_skipped(state, result, job, scale)

            is_last = state.step == config.steps
            if is_last or state.step % eval_interval == 0:
                held_out = _evaluate(pipeline, data.valid, job, journal, state.step)
                if is_last:
                    _require_finite(held_out, f"after {state.step} steps: lower lr (now {config.lr:g}) or raise warmup_steps")
                    state.loss_after = held_out.mean_loss
                    if data.test is not None:
                        state.loss_test = _evaluate(pipeline, data.test, job, journal, state.step, "test").mean_loss
            if is_last or state.step % config.checkpoint_interval == 0:
                save(job, mesh, optimizer, loss_scale, state)
                saved_step = state.step
    if state.step > saved_step:
        save(job, mesh, optimizer, loss_scale, state)
    return state


def evaluate(pipeline: Pipeline, samples: Samples, job: Job) -> Sums:
    """What the model is worth on the first `eval_samples` of some samples, or all of them: the same ones at every call."""
    mesh = pipeline.model.mesh
    with Prefetched(evaluation_batches(samples, job, mesh)) as feed:
        return total(measure_sums(pipeline, on_device(batches, mesh.device)) for batches in feed)


def _peak_memory(mesh: Mesh) -> int:
    """The most bytes that a process has held, of any rank: of tensors on its GPU, or on a CPU of everything."""
    own = torch.cuda.max_memory_allocated(mesh.device) if mesh.device.type == "cuda" else peak_bytes()
    return int(all_reduce_(torch.tensor(own, device=mesh.device), mesh.world_group, op=dist.ReduceOp.MAX).item())


def _evaluate(
    pipeline: Pipeline, samples: Samples, job: Job, journal: Journal, step: int, split: Literal["valid", "test"] = "valid"
) -> Sums:
    """Evaluate, and write it down."""
    started = time.perf_counter()
    found = evaluate(pipeline, samples, job)
    journal.evaluation(step, found, seconds=time.perf_counter() - started, split=split)
    return found


def _evaluation_plan(data: TrainingData, config: TrainConfig, dp: int) -> str:
    """What evaluations will cost, for people: by the rows that they compute."""

    def rows(samples: Samples | None) -> int:
        return 0 if samples is None else config.eval_rows(min(config.eval_samples, len(samples)), dp)

    interval, count = config.eval_every(dp), min(config.eval_samples, len(data.valid))
    computed = (config.evaluations(interval) - 1) * rows(data.valid) + rows(data.test)
    most = "all there are" if count == data.valid_in_all else f"of {data.valid_in_all:,}"
    wished = (
        f" (every {config.eval_interval:,} would cost over {float(EVAL_SHARE):.0%})" if interval != config.eval_interval else ""
    )
    which = f"{count:,} sample{'s' if count > 1 else ''} ({most})"
    share = float(computed * FORWARD_SHARE / config.samples)
    return (
        f"evaluation: {which}, before the first step, every {interval:,}{wished} and after the last: about {share:.1%} of the "
        "training's time"
    )


def _count_skipped(state: State, result: StepResult, job: Job, scale: float) -> None:
    """Count steps whose gradient was not finite.

    Raises:
        TrainingDiverged: these were too many in a row.
    """
    if result.grad_norm is None:
        return
    is_skipped = not math.isfinite(result.grad_norm)
    state.skipped_steps += is_skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if is_skipped else 0
    if state.skipped_in_a_row >= job.config.max_skipped_steps:
        raise TrainingDiverged(_diverged(state.step, job.config, job.checkpoints, scale))


def _diverged(step: int, config: TrainConfig, root: Path, scale: float) -> str:
    last = checkpoints.finished_steps(root)
    advice = f"Lower lr (now {config.lr:g}), raise warmup_steps (now {config.warmup_steps}), or look for text that is no text"
    if config.precision == "fp16":
        lower = "loss_scale" if config.loss_scale is not None else "initial_loss_scale"
        advice += f"; in fp16 also: lower {lower} (the loss scale was {scale:g}), or use bf16"
    return (
        f"the gradient was not finite in {config.max_skipped_steps} steps in a row, the last at step {step}; none of them "
        f"changed the weights. {f'The last checkpoint is step {last[0]}' if last else 'There is no checkpoint yet'}. {advice}"
    )


def _require_finite(held_out: Sums, when: str) -> None:
    if not held_out.weight:
        raise ValueError("no token of the held-out samples counts in the loss: give other data for them, or more (split)")
    if not math.isfinite(held_out.mean_loss):
        raise TrainingDiverged(f"the held-out loss is {held_out.mean_loss} {when}")
