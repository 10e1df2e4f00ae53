"""How to train, what, and on what: the settings of a run, and what follows from them for its steps. No torch in here."""

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_core_impl.config import Dropout, Kernel, Layout, ModelConfig, Recompute, check_choices, check_numbers
from megatron_core_impl.loss_scale import DynamicLossScale, LossScale, StaticLossScale
from megatron_core_impl.optim import (
    BatchSchedule,
    Kind,
    OptimizerSettings,
    Schedule,
    WeightDecayStyle,
    lr_at,
    weight_decay_at,
)

CHECKPOINTS_FOLDER = "checkpoints"
EVAL_SHARE = Fraction(5, 100)  # of the training's cost, that all evaluations stay below where eval_batches does not say
FORWARD_SHARE = Fraction(1, 3)  # what an evaluation costs of a training step on as many rows: the forward pass
MOST_EVAL_BATCHES = 100  # more of them tell nothing more
# What may differ between a run and the one that goes on from its checkpoint: how the work is shared out, what is told and kept,
# when to give up or to pause, and which of the steps to come are skipped.
MAY_CHANGE = {
    "micro_batch_size", "recompute", "recompute_layers_per_unit", "compile", "attention_kernel", "overlap",
    "max_skipped_steps", "skip_steps",
    "eval_interval", "checkpoint_interval", "keep_checkpoints", "log_interval", "stop_after_minutes",
}  # fmt: skip


class Rates(NamedTuple):
    """What the schedules give for a step."""

    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train, in optimizer steps.

    Raises ValueError, naming the fields, when settings do not go together.
    """

    steps: int
    sequence_length: int  # tokens of a sample that are predicted; it reads one more
    micro_batch_size: int
    global_batch_size: int
    ramp_start: int | None = None  # batches grow from here to global_batch_size; None: they do not
    ramp_increment: int | None = None
    ramp_samples: int | None = None

    optimizer: Kind = "adamw"
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    decay_steps: int | None = None  # None: steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.1
    weight_decay_start: float | None = None
    weight_decay_style: WeightDecayStyle = "constant"
    clip_grad: float = 1.0  # 0: no clipping

    precision: Literal["bf16", "fp16", "fp32", "fp64"] = "fp32"  # of the model; masters and moments are fp32 (fp64 in fp64)
    loss_scale: float | None = None  # fp16: None looks for the largest one that works
    initial_loss_scale: float = 2.0**16
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    loss_scale_hysteresis: int = 2
    max_skipped_steps: int = 20  # in a row

    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    lima_dropout: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_layers_per_unit: int = 1
    compile: bool = False  # parts of the layers: see parallel.compile
    attention_kernel: Literal["auto", Kernel] = "auto"  # auto: the fastest there is
    overlap: bool = True  # the sums and gathers of dp run under the passes of other layers

    seed: int = 1234
    split: str = "969,30,1"  # shares of train, valid, test documents
    reset_position_ids: bool = False  # these three: see data.masks
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    skip_steps: tuple[int, ...] = ()  # their data is consumed and their loss computed, but nothing is updated

    eval_interval: int = 100
    eval_batches: int | None = None  # global batches of held-out samples, the same each time; None: see `eval_samples`
    checkpoint_interval: int = 100
    keep_checkpoints: int = 2
    log_interval: int = 10
    stop_after_minutes: float | None = None

    # Of conversations; see data.instruction_dataset.
    packing: bool = True
    too_long: Literal["error", "drop", "truncate"] = "error"
    system_weight: float = 0.0
    user_weight: float = 0.0
    assistant_weight: float = 1.0

    # Parity with Megatron-LLM; see `rates` and `train_step`.
    reference_first_lr: bool = False
    reference_loss_mean: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self, "steps", "sequence_length", "micro_batch_size", "global_batch_size", "decay_steps", "loss_scale_window",
            "loss_scale_hysteresis", "max_skipped_steps", "recompute_layers_per_unit", "eval_interval", "eval_batches",
            "checkpoint_interval", "keep_checkpoints", "log_interval", at_least=1,
        )  # fmt: skip
        check_numbers(
            self, "min_lr", "warmup_steps", "weight_decay", "weight_decay_start", "seed",
            "system_weight", "user_weight", "assistant_weight", at_least=0,
        )  # fmt: skip
        if not (self.system_weight or self.user_weight or self.assistant_weight):
            raise ValueError(
                "system_weight, user_weight and assistant_weight are all 0, so nothing would be learnt from a conversation: "
                "raise one of them; usually assistant_weight is 1"
            )
        check_numbers(self, "lr", "loss_scale", "initial_loss_scale", "min_loss_scale", "stop_after_minutes", above=0)
        decay = self._last_decay_step
        if self.warmup_steps >= decay:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than the {decay} steps of the schedule")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must not exceed lr={self.lr}: lower min_lr too, or raise lr")
        if (self.weight_decay_style == "constant") != (self.weight_decay_start is None):
            raise ValueError(
                f"weight_decay_start={self.weight_decay_start} does not go with weight_decay_style={self.weight_decay_style}: "
                "a start needs the style linear or cosine, and these need a start"
            )
        if self.weight_decay_start is not None and self.weight_decay_start > self.weight_decay:
            raise ValueError(f"weight_decay_start={self.weight_decay_start} must not exceed weight_decay={self.weight_decay}")
        if self.loss_scale is not None and self.precision != "fp16":
            raise ValueError(f"loss_scale={self.loss_scale} is for precision fp16; {self.precision} needs none. Leave it out")
        ramp = {name: getattr(self, name) for name in ("ramp_start", "ramp_increment", "ramp_samples")}
        if len(missing := [name for name, value in ramp.items() if value is None]) in (1, 2):
            raise ValueError(f"a batch that grows needs all of {', '.join(ramp)}; missing: {', '.join(missing)}")
        if beyond := [step for step in self.skip_steps if not 1 <= step <= self.steps]:
            raise ValueError(f"skip_steps has {beyond[0]}, but steps are counted from 1 to {self.steps}")
        # What the parts refuse, they refuse now.
        _ = self.batches, self.optimizer_settings, self.dropout_settings, self.recompute_settings, self.new_loss_scale()

    def check_layout(self, layout: Layout) -> None:
        """Refuse batches that a layout cannot share out, before anything is trained.

        Raises:
            ValueError: naming the settings, their values and the legal ones.
        """
        unit = self.micro_batch_size * layout.dp
        sizes = self.batches.sizes
        if bad := next((size for size in sizes if size % unit), None):
            name = "train.global_batch_size=" if self.ramp_start is None else "train.ramp_start, ramp_increment: a batch of "
            raise ValueError(
                f"{name}{bad} is not a multiple of train.micro_batch_size × layout.dp = {self.micro_batch_size} × {layout.dp} "
                f"= {unit}. Nearest legal: {_neighbours(bad, unit)}"
            )
        if layout.vpp > 1 and (bad := next((size for size in sizes if size // unit % layout.pp), None)):
            raise ValueError(
                f"layout.vpp={layout.vpp} needs a number of micro batches that is a multiple of layout.pp={layout.pp}, and a "
                f"batch of {bad} samples has {bad // unit} (train.micro_batch_size × layout.dp = {unit} samples each). Nearest "
                f"legal batch: {_neighbours(bad, unit * layout.pp)}. With layout.vpp=1 any number is legal"
            )
        if (self.micro_batch_size * self.sequence_length) % layout.tp:
            raise ValueError(
                f"layout.tp={layout.tp} does not divide the {self.micro_batch_size} × {self.sequence_length} tokens of a micro "
                "batch (train.micro_batch_size × train.sequence_length), which it shares out. Make one of the two a multiple "
                f"of {layout.tp}"
            )

    @cached_property
    def batches(self) -> BatchSchedule:
        """The size of the global batch over the run."""
        if self.ramp_start is None or self.ramp_increment is None or self.ramp_samples is None:
            return BatchSchedule(global_batch_size=self.global_batch_size)
        return BatchSchedule(
            global_batch_size=self.global_batch_size,
            start=self.ramp_start, increment=self.ramp_increment, ramp_samples=self.ramp_samples,
        )  # fmt: skip

    @cached_property
    def samples(self) -> int:
        """What all steps together consume."""
        return self.batches.samples_of(self.steps)

    def evaluations(self, interval: int) -> int:
        """How often a run evaluates: before the first step, at intervals, after the last, and once on the test split."""
        return 2 + -(-self.steps // interval)

    @cached_property
    def eval_samples(self) -> int:
        """The most samples that an evaluation reads; the same under any layout, so that held-out losses are.

        Without `eval_batches`, as many as keep all evaluations of the run below `EVAL_SHARE` of the training's cost: whole
        global batches, at most `MOST_EVAL_BATCHES`, or an equal part of one, which most layouts share out without empty rows.
        At least one sample.
        """
        whole = self.global_batch_size
        if self.eval_batches is not None:
            return self.eval_batches * whole
        each = self._eval_budget // self.evaluations(self.eval_interval)
        if each >= whole:
            return min(each // whole, MOST_EVAL_BATCHES) * whole
        divisors = (n for i in range(1, math.isqrt(whole) + 1) if whole % i == 0 for n in (i, whole // i))
        return max((n for n in divisors if n <= each), default=1)

    def eval_every(self, dp: int) -> int:
        """The steps between evaluations: `eval_interval`, or without `eval_batches` the multiple of it that the budget allows.

        Args:
            dp: of the layout. A rank computes whole micro batches, so that is how finely it can spend.
        """
        affordable = self._eval_budget // self.eval_rows(self.eval_samples, dp)
        if self.eval_batches is not None or self.evaluations(self.eval_interval) <= affordable:
            return self.eval_interval
        at_intervals = max(1, affordable - 2)  # beside the first, and that of the test split
        return -(-self.steps // (at_intervals * self.eval_interval)) * self.eval_interval

    def eval_rows(self, samples: int, dp: int) -> int:
        """The rows that are computed, on all ranks, to evaluate so many samples."""
        unit = self.micro_batch_size * dp
        return -(-samples // unit) * unit

    @property
    def _eval_budget(self) -> int:
        """The most rows that all evaluations together may compute, by default: those that cost less than `EVAL_SHARE`."""
        return math.ceil(EVAL_SHARE / FORWARD_SHARE * self.samples) - 1

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        return OptimizerSettings(
            kind=self.optimizer, beta1=self.beta1, beta2=self.beta2, eps=self.eps, momentum=self.momentum,
            weight_decay=self.weight_decay, clip_grad=self.clip_grad,
            overlap_reduce=self.overlap, overlap_gather=self.overlap,
        )  # fmt: skip

    @property
    def dropout_settings(self) -> Dropout:
        return Dropout(hidden=self.hidden_dropout, attention=self.attention_dropout, lima=self.lima_dropout)

    @property
    def recompute_settings(self) -> Recompute:
        return Recompute(mode=self.recompute, layers_per_unit=self.recompute_layers_per_unit)

    @property
    def kernel(self) -> Kernel | None:
        """The attention kernel that is asked for, or None."""
        return None if self.attention_kernel == "auto" else self.attention_kernel

    @property
    def _last_decay_step(self) -> int:
        return self.steps if self.decay_steps is None else self.decay_steps

    @property
    def resets_at_eod(self) -> bool:
        """Whether the end of a document means anything inside a sample."""
        return self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss

    def new_loss_scale(self) -> LossScale:
        """The scale that a run begins with."""
        if self.precision != "fp16":
            return StaticLossScale()
        if self.loss_scale is not None:
            return StaticLossScale(self.loss_scale)
        return DynamicLossScale(
            initial=self.initial_loss_scale, minimum=self.min_loss_scale,
            window=self.loss_scale_window, hysteresis=self.loss_scale_hysteresis,
        )  # fmt: skip

    @cached_property
    def _schedule_samples(self) -> tuple[int, int]:
        """Samples at which warm-up and decay end."""
        return self.batches.samples_of(self.warmup_steps), self.batches.samples_of(self._last_decay_step)

    def rates(self, consumed_samples: int) -> Rates:
        """Learning rate and weight decay of the step that begins after so many samples.

        Schedules count samples, as batches may grow: n steps of warm-up are the samples of the first n steps. A step stands
        where it ends, so that the first is not spent at a rate of 0, and the last is at `min_lr`, which may be 0; in the
        reference (`reference_first_lr`) it stands where it begins. A skipped step does not hold the schedules up.
        """
        n = consumed_samples if self.reference_first_lr else consumed_samples + self.batches.size_at(consumed_samples)
        warmup, decay = self._schedule_samples
        start = self.weight_decay if self.weight_decay_start is None else self.weight_decay_start
        return Rates(
            lr_at(n, lr=self.lr, min_lr=self.min_lr, warmup_steps=warmup, decay_steps=decay, schedule=self.schedule),
            weight_decay_at(n, start=start, end=self.weight_decay, ramp_steps=self.samples, style=self.weight_decay_style),
        )


def _neighbours(number: int, unit: int) -> str:
    """The positive multiples of a unit next to a number that is none."""
    below = number // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Tokenized documents that training takes samples from."""

    prefix: Path  # of the files
    role: Literal["all", "train", "valid", "test"] = "all"  # all: shared out by config.split; else it is taken whole
    weight: float = 1.0  # its share among those of a role; they need not sum to anything
    fingerprint: str  # of its content

    @property
    def name(self) -> str:
        """What people call it."""
        return self.prefix.name


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and where the results go."""

    config: TrainConfig
    model: ModelConfig
    weights: Path  # folder of the weights to start from, in any form that `open_weights` reads
    sets: tuple[DataSet, ...]
    content: Literal["text", "conversations"] = "text"  # of all of them
    folder: Path  # gets checkpoints/, metrics.jsonl, tensorboard/
    cache: Path | None = None  # folder that keeps the indices of samples, for all jobs; None: each process makes its own
    eod_id: int | None = None  # the token that ends a document in the sets
    header_tokens: int = 0  # conversations: at the beginning of every answer, which no metric counts

    def __post_init__(self) -> None:
        if not self.sets:
            raise ValueError("a job needs at least one dataset")
        if self.config.resets_at_eod and self.eod_id is None:
            raise ValueError(
                "reset_position_ids, reset_attention_mask and eod_mask_loss need the id of the token that ends a document, and "
                "eod_id is None"
            )

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS_FOLDER

    def must_agree(self) -> dict[str, Any]:
        """What a checkpoint was made with, and whoever goes on from it must have too. JSON values."""
        may_change = MAY_CHANGE - ({"micro_batch_size"} if self.config.reference_loss_mean else set())
        if self.config.eval_batches is None:
            may_change = may_change - {"eval_interval"}  # the size of an evaluation follows from it
        settings = {name: value for name, value in asdict(self.config).items() if name not in may_change}
        sets = [[one.role, one.weight, one.fingerprint] for one in self.sets]
        return settings | {"model": asdict(self.model), "content": self.content, "datasets": sets}
