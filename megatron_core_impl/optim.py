"""The learning-rate schedule. No torch in here."""

from math import cos, pi
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def lr_at(n: int, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int, schedule: Schedule) -> float:
    """The learning rate at `n` (golden fact G6: Megatron's formulas).

    Linear warm-up from 0 at n = 0 to `lr` at `warmup_steps`, then down to `min_lr` at `decay_steps` by a half cosine or a
    straight line, and `min_lr` from there on. `constant` stays at `lr` and ignores `min_lr`. Training step k, counted from 1,
    uses n = k, so that no step is spent at a rate of 0.
    """
    if warmup_steps > 0 and n <= warmup_steps:
        return lr * n / warmup_steps
    if schedule == "constant":
        return lr
    if n > decay_steps:
        return min_lr
    done = (n - warmup_steps) / (decay_steps - warmup_steps)
    left = 0.5 * (cos(pi * done) + 1.0) if schedule == "cosine" else 1.0 - done
    return min_lr + (lr - min_lr) * left
