"""The curve of a training as a picture: loss of the steps, held-out loss, learning rate. The same lines give the same bytes."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_core_impl.metrics import downsample

POINTS = 1000  # of a curve; the picture has fewer pixels
TRAIN, HELD_OUT, RATE, FRAME = "#7ba6d0", "#d9541e", "#72778a", "#c9ccd3"


def draw_losses(lines: Sequence[Mapping[str, Any]], target: Path) -> bool:
    """Draw the lines of a metrics.jsonl as PNG. False, and no picture, where neither loss has two points to make a curve.

    A short training may have told its loss once, and its held-out loss more often. A value that was not finite, which the
    lines have as null, is a gap.
    """
    trained, held_out, rates = (_curve(lines, name) for name in ("loss", "valid_loss", "lr"))
    if max(len(trained), len(held_out)) < 2:
        return False
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # whatever style this machine has
        figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        if trained:
            loss.plot(
                *zip(*trained, strict=True), color=TRAIN, linewidth=1.2, marker=_marker(trained), markersize=3, label="training"
            )
        if held_out:
            loss.plot(
                *zip(*held_out, strict=True), color=HELD_OUT, linewidth=1.2, marker="o", markersize=4.5, label="held-out data"
            )
            for (step, value), right in {held_out[0]: False, held_out[-1]: True}.items():
                loss.annotate(
                    f"{value:.2f}", (step, value), (-2 if right else 8, 8), textcoords="offset points", color=HELD_OUT,
                    fontsize=9, ha="right" if right else "left", zorder=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                )  # fmt: skip
        loss.margins(y=0.09)
        loss.set_ylabel("loss")
        loss.legend(frameon=False, loc="upper right")
        if rates:
            rate.plot(*zip(*rates, strict=True), color=RATE, linewidth=1.2, marker=_marker(rates), markersize=3)
        rate.set_ylim(bottom=0)
        rate.set_ylabel("learning rate")
        rate.yaxis.set_major_locator(MaxNLocator(2))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        rate.xaxis.set_major_locator(MaxNLocator(integer=True))
        rate.set_xlabel("step")
        for axes in (loss, rate):
            axes.grid(color=FRAME, linewidth=0.5, alpha=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(FRAME)
            axes.tick_params(color=FRAME)
        figure.align_ylabels()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png", metadata={"Software": None})
    return True


def _marker(points: Sequence[tuple[float, float]]) -> str | None:
    """A line of one point is invisible."""
    return "o" if len(points) == 1 else None


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The values of one figure, by step."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [(step, float("nan") if value is None else value) for step, value in downsample(points, POINTS)]
