"""Train a model on tp × pp × dp processes: weights and a dataset in, a checkpoint out.

Started as a stage, this process loads no torch. It checks that weights, data, layout and settings fit each other, starts the
workers through torchrun, passes on what they say, and publishes the last checkpoint. Each worker runs this module again, with
RANK set, and trains. Where several machines share the work (STAGE_NODES), the first does all that; once it says JOIN, each
of the others runs this module as well, which there starts workers only. They see the same workspace.

Asked to stop (SIGTERM, Ctrl-C), or after `stop_after_minutes`, the workers finish their step and save a checkpoint. However
training ends, the same spec goes on from the newest checkpoint that is intact.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_core_impl import metrics
from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.memory import Device
from megatron_core_impl.train_config import Job
from megatron_core_impl.training_data import conversation_figures, tokens_per_epoch
from stages import runtime, torchrun
from stages.context import Context, tell
from stages.contracts import artifacts as a
from stages.contracts import length, memory, training_job, vocabulary
from stages.contracts.figures import perplexity
from stages.contracts.process import JOIN
from stages.contracts.specs import TrainSpec
from stages.contracts.words import size
from stages.outcomes import BadInput, GateFailed, Interrupted, StageError
from stages.torchrun import WorkerCrashed
from stages.training_figures import figures_of

if TYPE_CHECKING:
    from megatron_core_impl.mesh import Mesh

CHECKPOINTS = "checkpoints"
LOG = "logs/workers.log"
COMPILED = ".cache/torch-compile"  # in the workspace
SPEC_FILE = "spec.json"  # the workers' copy
RESETS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")  # settings that look for the end of documents


def run(spec: TrainSpec, ctx: Context) -> a.CheckpointArtifact:
    """The stage: check, start workers, listen, publish."""
    weights, _ = ctx.input("weights", a.WeightsArtifact)
    dataset, _ = ctx.input("dataset", a.DatasetArtifact)
    check(spec, weights, dataset)
    job = job_of(spec, weights, dataset, ctx.scratch)
    layout, world_size = spec.layout, spec.layout.world_size
    ctx.log(
        f"{world_size} process{'es' if world_size > 1 else ''}, dp {layout.dp} × tp {layout.tp} × pp {layout.pp}"
        f"{f' (vpp {layout.vpp})' if layout.vpp > 1 else ''}"
    )
    epoch = tokens_per_epoch(job)
    ctx.log(f"length: {length.described(spec.settings, epoch)}")

    (ctx.scratch / SPEC_FILE).write_text(spec.model_dump_json())
    listener = Listener(ctx)
    try:
        outcome = _run_workers(spec, ctx, listener.take)
        outcome.is_stopped |= listener.is_paused
        if not listener.is_done:
            raise failure(outcome, spec, ctx.scratch, listener.step)
    finally:
        checkpoints.remove_unfinished(ctx.scratch / CHECKPOINTS)
    return publish(spec, ctx, weights, dataset, epoch, conversation_figures(job) if job.content == "conversations" else {})


def take_part(spec: TrainSpec, ctx: Context) -> None:
    """What a further machine does of the stage: run its workers. The first machine has charge of everything else."""
    outcome = _run_workers(spec, ctx, Listener(ctx).take)  # rank 0 is elsewhere; these speak when something is wrong
    if outcome.returncode:
        raise failure(outcome, spec, ctx.scratch, None)


def _run_workers(spec: TrainSpec, ctx: Context, on_event: Callable[[torchrun.Event], None]) -> torchrun.Outcome:
    """Run this machine's workers to their end."""
    nodes = torchrun.Nodes.here()
    if nodes.count > 1 and nodes.rank == 0:
        tell(JOIN)
    return torchrun.run_workers(
        "stages.train",
        [str(ctx.scratch / SPEC_FILE)],
        processes=spec.layout.world_size // nodes.count,
        log=_log_file(ctx.scratch),
        on_event=on_event,
        nodes=nodes,
    )


def _log_file(scratch: Path) -> Path:
    """What this machine's workers print goes there."""
    rank = torchrun.Nodes.here().rank
    return scratch / (f"logs/workers-{rank}.log" if rank else LOG)


def check(spec: TrainSpec, weights: a.WeightsArtifact, dataset: a.DatasetArtifact) -> None:
    """Refuse what does not fit together.

    Raises:
        BadInput: naming the fields and both values.
    """
    model, settings, layout = weights.model, spec.settings, spec.layout
    if dataset.tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"dataset.tokenizer.vocab_size={dataset.tokenizer.vocab_size}, but weights.model.vocab_size={model.vocab_size}: "
            "the data has ids that the model has no embedding for. Preprocess the text with the tokenizer of this model"
        )
    if told := vocabulary.difference(dataset, model):
        raise BadInput(f"inputs: {told}")
    if settings.sequence_length > model.max_position_embeddings:
        raise BadInput(
            f"train.sequence_length={settings.sequence_length} exceeds "
            f"weights.model.max_position_embeddings={model.max_position_embeddings}. Lower train.sequence_length"
        )
    for axis in ("tp", "pp", "vpp"):
        ours, theirs = getattr(layout, axis), getattr(weights, axis)
        if ours != theirs:
            raise BadInput(
                f"layout.{axis}={ours}, but weights.{axis}={theirs}: run the shard stage with {axis}={ours}, or set "
                f"layout.{axis} to {theirs}"
            )
    try:
        layout.layout().check(ModelConfig(**model.config_fields()))
    except ValueError as error:
        raise BadInput(f"layout: {error}") from None
    resets = [f"train.{name}" for name in RESETS if getattr(settings, name)]
    if resets and (dataset.tokenizer.eod_id is None or dataset.bos_eos == "none"):
        missing = "bos_eos=none" if dataset.tokenizer.eod_id is not None else "tokenizer.eod_id=None"
        raise BadInput(
            f"{' and '.join(resets)} need a token at the end of each document, but dataset.{missing}: preprocess the text with "
            f"preprocess.bos_eos=eos{'' if 'bos_eos' in missing else ' and a tokenizer that has one'}, or leave them out"
        )


@dataclass
class Listener:
    """Passes on what the workers tell: rank 0 speaks, the others only when something is wrong."""

    ctx: Context
    step: int = 0  # the last one that is finished
    is_done: bool = False
    is_paused: bool = False  # the workers have ended with a checkpoint, before the last step

    def take(self, event: torchrun.Event) -> None:
        match event:
            case {"event": "progress", "done": done, "total": total, "text": text}:
                self.step = int(done)
                self.ctx.progress(done, total, text)
            case {"event": "log", "text": text}:
                self.ctx.log(text)
            case {"event": "warn", "text": text}:
                self.ctx.warn(text)
            case {"event": "done"}:
                self.is_done = True
            case {"event": "paused"}:
                self.is_paused = True


def failure(outcome: torchrun.Outcome, spec: TrainSpec, scratch: Path, step: int | None) -> BaseException:
    """What to raise when the workers have not finished: who died of what, and what a person can do.

    Args:
        step: the last one that is finished. None: this machine's workers do not tell.
    """
    settings = spec.settings
    saved = checkpoints.finished_steps(scratch / CHECKPOINTS)
    last = f"Last checkpoint: step {saved[0]}" if saved else "There is no checkpoint yet"
    again = f"run again to go on from step {saved[0]}" if saved else "run again to start anew"
    when = f" in step {step + 1}" if step else "" if step is None else " before its first step was done"
    less_memory = (
        f"Lower train.micro_batch_size (now {settings.micro_batch_size})"
        if settings.micro_batch_size > 1
        else f"Set train.recompute to full (now {settings.recompute}), lower train.sequence_length (now "
        f"{settings.sequence_length}), or raise layout.tp (now {spec.layout.tp}) or pp (now {spec.layout.pp})"
    )
    if outcome.killed is not None:
        rank, number = outcome.killed
        if number == signal.SIGKILL:
            return StageError(
                f"rank {rank} was killed by the kernel (out of memory?){when}. {last}. {less_memory} if memory is short; "
                f"else {again}"
            )
        return WorkerCrashed(f"rank {rank} died of {number.name}{when}. {last}. What it printed: {_log_file(scratch)}")
    if outcome.errors:
        match outcome.errors[0]:
            case {"kind": "bad-input", "message": message}:
                return BadInput(message)
            case {"kind": "diverged", "message": message}:
                return GateFailed(message)
            case {"kind": "memory", "rank": rank}:
                return StageError(f"rank {rank} ran out of memory{when}. {last}. {less_memory}")
            case {"kind": "system", "errno": number, "message": message, "file": file}:
                return OSError(number, message, file or str(scratch))
            case {"rank": rank, "message": message, "trace": trace}:
                print(trace, file=sys.stderr, flush=True)
                return WorkerCrashed(
                    f"rank {rank}{when and ','}{when}: {message}. This is a defect of ours; its log has the traceback; what "
                    f"the workers printed is in {_log_file(scratch)}. {last}"
                )
    if outcome.is_stopped:
        return Interrupted(f"stopped; saved at step {saved[0]}; {again}" if saved else f"stopped before a step; {again}")
    return WorkerCrashed(
        f"the workers ended (torchrun: {outcome.returncode}){when}. What they printed: {_log_file(scratch)}. {last}"
    )


def publish(
    spec: TrainSpec,
    ctx: Context,
    weights: a.WeightsArtifact,
    dataset: a.DatasetArtifact,
    epoch: int,
    of_data: dict[str, Any],
) -> a.CheckpointArtifact:
    """The artifact: the last checkpoint, the curves, the figures.

    Args:
        epoch: the tokens of one.
        of_data: figures that its data have, by name.
    """
    root = ctx.scratch / CHECKPOINTS
    last, *older = checkpoints.finished_steps(root)
    for step in older:
        shutil.rmtree(checkpoints.step_folder(root, step))
    (ctx.scratch / SPEC_FILE).unlink()
    state = checkpoints.read_state(checkpoints.step_folder(root, last))
    before, after = state["loss_before"], state["loss_after"]
    gone_through = length.length_of(spec.settings, epoch)
    assert gone_through is not None
    figures = figures_of(metrics.read_metrics(ctx.scratch), state, last) | of_data
    return ctx.artifact(
        a.CheckpointArtifact,
        figure=(
            f"held-out loss {before:.2f} → {after:.2f} · perplexity {perplexity(before)} → {perplexity(after)} · "
            f"checkpoint at step {last}"
        ),
        metrics={"length": gone_through._asdict(), **figures},
        volatile=(metrics.METRICS_FILE, metrics.TENSORBOARD_FOLDER + "/", "logs/"),
        model=weights.model,
        tokenizer=dataset.tokenizer,
        checkpoint=checkpoints.step_folder(root, last).relative_to(ctx.scratch).as_posix(),
        step=last,
        consumed_samples=state["consumed_samples"],
        consumed_tokens=state["consumed_tokens"],
        tp=spec.layout.tp,
        pp=spec.layout.pp,
        dp=spec.layout.dp,
        vpp=spec.layout.vpp,
        loss_before=before,
        loss_after=after,
    )


# In a worker


def work(spec_file: Path) -> int:
    """A worker's life: train, and tell the stage how it went. Returns the exit code."""
    should_stop = torchrun.join()
    try:
        finished = _train(TrainSpec.model_validate_json(spec_file.read_bytes()), spec_file.parent, should_stop)
    except BaseException as error:
        traceback.print_exc()  # into the log
        torchrun.tell("error", **_told(error), trace=traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # at once: other ranks may wait for this one, and torch's threads for them
    if os.environ["RANK"] == "0":
        torchrun.tell("done" if finished else "paused")
    return 0


def _told(error: BaseException) -> dict[str, str | int | None]:
    """What an error means for the person who started the stage."""
    from megatron_core_impl.trainer import TrainingDiverged

    return {"kind": "diverged", "message": str(error)} if isinstance(error, TrainingDiverged) else torchrun.meaning(error)


def job_of(spec: TrainSpec, weights: a.WeightsArtifact, dataset: a.DatasetArtifact, scratch: Path) -> Job:
    """What the spec asks for.

    Raises:
        BadInput: the data do not give it.
    """
    workspace = Path(spec.workspace)
    folder = weights.folder(workspace)
    try:
        return training_job.job_of(
            workspace, dataset, spec.settings, weights.model, blend=spec.blend, weights=folder, folder=scratch
        )
    except ValueError as error:
        raise BadInput(str(error)) from None


def _train(spec: TrainSpec, scratch: Path, should_stop: Callable[[], bool]) -> bool:
    """Train with the other workers; whether the last step is done."""
    import torch.distributed as dist

    from megatron_core_impl.host_memory import keep_freed_memory
    from megatron_core_impl.mesh import init_mesh
    from megatron_core_impl.trainer import train
    from megatron_core_impl.training_data import prepare

    workspace = Path(spec.workspace)
    weights, dataset = (a.load_artifact(workspace / spec.inputs[name].path) for name in ("weights", "dataset"))
    assert isinstance(weights, a.WeightsArtifact)
    assert isinstance(dataset, a.DatasetArtifact)
    layout = spec.layout.layout()
    job = job_of(spec, weights, dataset, scratch)
    prepare(job)  # before there is a process group: who waits in one gives up
    report = metrics.Report(
        log=lambda text: torchrun.tell("log", text=text),
        warn=lambda text: torchrun.tell("warn", text=text),
        progress=lambda done, total, text: torchrun.tell("progress", done=done, total=total, text=text),
    )
    # What is compiled is kept, for the runs to come; torch's own choice is a folder in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(workspace / COMPILED))
    mesh = init_mesh(layout, torchrun.join_group(), kv_replicas=layout.kv_replicas(job.model))
    if mesh.device.type == "cpu":
        keep_freed_memory()  # where there is another malloc, it is just slower
    _tell_memory(spec, job.model, mesh, report)
    state = train(job, mesh, report=report, should_stop=should_stop)
    dist.destroy_process_group()
    return state.step == job.config.steps


def _tell_memory(spec: TrainSpec, model: ModelConfig, mesh: "Mesh", report: metrics.Report) -> None:
    """How much each process is going to need, and whether its GPU has it. The first of those that are alike speaks."""
    import torch

    device: Device = "cuda" if mesh.device.type == "cuda" else "cpu"
    gpu = torch.cuda.get_device_properties(mesh.device) if device == "cuda" else None
    if mesh.rank == 0:
        worst = memory.expected(model, spec.layout, spec.settings, device=device)
        where = f"; {gpu.name} has {size(gpu.total_memory)}" if gpu is not None else ""
        report.log(f"memory of a process, estimated: {memory.described(worst)}{where}")
    if gpu is not None and mesh.tp_rank == mesh.dp_rank == 0:
        own = memory.expected(model, spec.layout, spec.settings, device=device, rank=mesh.rank)
        if text := memory.shortage(own, gpu.total_memory, spec.layout, spec.settings):
            report.warn(f"rank {mesh.rank} {text}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(work(Path(sys.argv[1])))
    runtime.main("train", run, __doc__, resumable=True, part=take_part if torchrun.Nodes.here().rank else None)
