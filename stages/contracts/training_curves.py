"""The curves of a training, from the lines that it writes: while it runs, and when it is over."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_core_impl.metrics import downsample, read_metrics

Points = list[tuple[int, float | None]]  # by step; None: it was not finite

MOST_POINTS = 300  # of a curve: a screen shows no more


@dataclass(frozen=True)
class Curves:
    """What a training told of itself, by step."""

    loss: Points
    held_out: Points
    lr: Points
    grad_norm: Points
    tokens_per_second: Points
    memory: int | None  # bytes that any of its processes held at most


def curves_in(folder: Path) -> Curves | None:
    """The curves in the folder of a training, of its result or of its unfinished work; None where it has told nothing, or its
    file cannot be read.
    """
    try:
        curves = _read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return curves if curves.loss or curves.held_out else None


def _read(folder: Path) -> Curves:
    lines = read_metrics(folder)
    return Curves(
        loss=_curve(lines, "loss"),
        held_out=_curve(lines, "valid_loss"),
        lr=_curve(lines, "lr"),
        grad_norm=_curve(lines, "grad_norm"),
        tokens_per_second=_curve(lines, "tokens_per_second"),
        memory=max((int(line["memory"]) for line in lines if line.get("memory")), default=None),
    )


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    points = [(line["step"], math.nan if line[name] is None else line[name]) for line in lines if name in line]
    return [(step, value if math.isfinite(value) else None) for step, value in downsample(points, MOST_POINTS)]
