"""What an optimizer is told: its settings, and learning rate, weight decay and batch size as functions of progress.

All of it is pure arithmetic without torch, with the reference's formulas (golden facts G6 and G7), so that a run which goes on
from a checkpoint needs to know nothing but how far it was.
"""

from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Literal

from megatron_core_impl.config import check_choices, check_numbers

Kind = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "constant", "inverse-square-root"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How weights are updated. Parameters of one dim (norms, biases) never decay.

    Raises ValueError, naming the field, when a value is out of range.
    """

    kind: Kind = "adamw"  # adamw: decay is decoupled from the gradient; sgd: it is added to it, as `torch.optim.SGD` does
    beta1: float = 0.9  # of adamw, as the two that follow
    beta2: float = 0.95
    eps: float = 1e-5
    momentum: float = 0.9  # of sgd; 0: no momentum, and no state
    weight_decay: float = 0.1  # where a step is not told another
    clip_grad: float = 1.0  # largest norm of the whole model's gradient; 0 does not clip
    overlap_reduce: bool = True  # sum a layer's gradients over dp while the backward passes of earlier layers run
    overlap_gather: bool = True  # gather a layer's new weights over dp while the forward passes of earlier layers run

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, "beta1", "beta2", "momentum", at_least=0, below=1)
        check_numbers(self, "eps", "weight_decay", "clip_grad", at_least=0)


def lr_at(n: int, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int, schedule: Schedule) -> float:
    """The learning rate at `n` (golden fact G6: Megatron's formulas).

    Linear warm-up from 0 at n = 0 to `lr` at `warmup_steps`, then down to `min_lr` at `decay_steps` by a half cosine or a
    straight line, or as the inverse square root of n for as long as that is above `min_lr`; `min_lr` after `decay_steps`.
    `constant` stays at `lr` and ignores `min_lr`. n, `warmup_steps` and `decay_steps` count in one unit, whichever it is; a
    trainer counts samples, as batches may grow (`TrainConfig.rates`). For all schedules but one the unit does not matter.
    The inverse square root without warm-up depends on it, as in the reference: there the first step, which ends at
    n = global_batch_size samples, runs at lr / √global_batch_size.
    """
    if warmup_steps > 0 and n <= warmup_steps:
        return lr * n / warmup_steps
    if schedule == "constant":
        return lr
    if n > decay_steps:
        return min_lr
    if schedule == "inverse-square-root":
        return max(min_lr, lr * sqrt(max(warmup_steps, 1)) / sqrt(max(n, 1)))
    done = (n - warmup_steps) / (decay_steps - warmup_steps)
    left = 0.5 * (cos(pi * done) + 1.0) if schedule == "cosine" else 1.0 - done
    return min_lr + (lr - min_lr) * left


def weight_decay_at(n: int, *, start: float, end: float, ramp_steps: int, style: WeightDecayStyle) -> float:
    """The weight decay at `n`: from `start` at 0 to `end` at `ramp_steps`, and `end` from there on (golden fact G6).

    `constant` is `end` throughout. The unit of n and `ramp_steps` is that of `lr_at`.
    """
    if style == "constant" or n >= ramp_steps:
        return end
    done = n / ramp_steps
    return start + (end - start) * (done if style == "linear" else 0.5 * (1.0 - cos(pi * done)))


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """The global batch size, which may grow over the first samples of a run (golden fact G7: Megatron's --rampup_batch_size).

    From `start` it grows by `increment` each time another equal part of `ramp_samples` has been consumed, and is
    `global_batch_size` from `ramp_samples` on. Without `start` it is constant.

    Raises ValueError when no number of increments leads from `start` to `global_batch_size`.
    """

    global_batch_size: int
    start: int | None = None
    increment: int = 1
    ramp_samples: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "global_batch_size", at_least=1)
        check_numbers(self, "start", "increment", "ramp_samples")
        if self.start is None:
            return
        if not 1 <= self.start <= self.global_batch_size or self.increment < 1 or self.ramp_samples < 1:
            raise ValueError(
                f"a batch that grows needs a start between 1 and global_batch_size={self.global_batch_size}, an increment and "
                f"ramp_samples of at least 1, not start={self.start}, increment={self.increment}, "
                f"ramp_samples={self.ramp_samples}"
            )
        if (self.global_batch_size - self.start) % self.increment:
            raise ValueError(
                f"from start={self.start} by increment={self.increment} the batch never is "
                f"global_batch_size={self.global_batch_size}. Change one of them so that increment divides "
                f"{self.global_batch_size - self.start}"
            )

    @property
    def sizes(self) -> range:
        """All sizes that occur, in order."""
        first = self.global_batch_size if self.start is None else self.start
        return range(first, self.global_batch_size + 1, self.increment)

    def size_at(self, consumed_samples: int) -> int:
        """The size of the batch that begins after so many samples."""
        if self.start is None or consumed_samples >= self.ramp_samples:
            return self.global_batch_size
        return self.sizes[consumed_samples * (len(self.sizes) - 1) // self.ramp_samples]

    def samples_of(self, steps: int) -> int:
        """How many samples the first `steps` steps of a run consume."""
        samples = taken = 0
        while taken < steps and self.start is not None and samples < self.ramp_samples:
            samples += self.size_at(samples)
            taken += 1
        return samples + (steps - taken) * self.global_batch_size

    def steps_within(self, samples: int) -> int:
        """The most steps from the beginning of a run that consume no more than so many samples."""
        consumed = steps = 0
        while self.start is not None and consumed < self.ramp_samples:
            consumed += self.size_at(consumed)
            if consumed > samples:
                return steps
            steps += 1
        return steps + max(0, samples - consumed) // self.global_batch_size
