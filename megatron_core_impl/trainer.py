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

from megatron_core_impl.batches import micro_batches, open_datasets
from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.data.gpt_dataset import GPTDataset
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.metrics import Journal, Report
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.random import seed_step
from megatron_core_impl.resume import State, any_says, begin, save
from megatron_core_impl.train_config import Job, TrainConfig
from megatron_core_impl.train_step import StepResult, measure, train_step


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
    train_data, valid_data = open_datasets(job)
    model, optimizer, loss_scale, state = begin(job, mesh, report)
    pipeline = Pipeline(model)
    resumed_step = saved_step = state.step

    def must_stop() -> bool:
        limit = config.stop_after_minutes
        has_moved = state.step > resumed_step  # or a short time would never lead anywhere
        is_late = limit is not None and has_moved and time.monotonic() - begun >= 60 * limit
        if is_late and mesh.rank == 0:
            report.log(f"stop_after_minutes={limit:g} have passed")
        return any_says(is_late or should_stop(), mesh)

    with Journal(
        job.folder if mesh.rank == 0 else None,
        report, steps=config.steps, log_interval=config.log_interval, resume_step=state.step,
    ) as journal:  # fmt: skip
        if state.loss_before is None:
            state.loss_before = evaluate(pipeline, valid_data, job)
            journal.evaluation(0, state.loss_before)
            _require_finite(
                state.loss_before, "before the first step: the weights to start from are damaged, or not this model's"
            )
        while state.step < config.steps and not must_stop():
            started = time.perf_counter()
            batch_size = config.batches.size_at(state.consumed_samples)
            rates, scale = config.rates(state.consumed_samples), loss_scale.scale
            batches = micro_batches(train_data, state.consumed_samples, batch_size, job, mesh)
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
                tokens=result.tokens,
                seconds=time.perf_counter() - started,
                lr=rates.lr,
                grad_norm=result.grad_norm,
                loss_scale=scale if config.precision == "fp16" else None,
                batch_size=batch_size if config.ramp_start is not None else None,
            )
            _count_skipped(state, result, job, scale)

            is_last = state.step == config.steps
            if is_last or state.step % config.eval_interval == 0:
                held_out = evaluate(pipeline, valid_data, job)
                journal.evaluation(state.step, held_out)
                if is_last:
                    _require_finite(held_out, f"after {state.step} steps: lower lr (now {config.lr:g}) or raise warmup_steps")
                    state.loss_after = held_out
            if is_last or state.step % config.checkpoint_interval == 0:
                save(job, mesh, optimizer, loss_scale, state)
                saved_step = state.step
    if state.step > saved_step:
        save(job, mesh, optimizer, loss_scale, state)
    return state


def evaluate(pipeline: Pipeline, data: GPTDataset, job: Job) -> float:
    """Mean loss over the tokens of the first `eval_batches` global batches of a dataset: the same ones at every call."""
    loss_sum, tokens = 0.0, 0
    size = job.config.global_batch_size
    for number in range(job.config.eval_batches):
        result = measure(pipeline, micro_batches(data, number * size, size, job, pipeline.model.mesh))
        loss_sum += result.loss * result.tokens
        tokens += result.tokens
    return loss_sum / tokens if tokens else math.nan


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


def _require_finite(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the held-out loss is {loss} {when}")
