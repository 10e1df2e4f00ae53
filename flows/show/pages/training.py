"""The page of a training that is going on: how far it is, whether the loss falls, how fast, how long still."""

from datetime import datetime

from flows.launch.protocol import Progress
from flows.records.story import told_memory
from flows.show.charts import progress_bar
from flows.show.pages.markdown import facts, page, picture
from flows.show.pictures import loss_chart
from stages.contracts.training_curves import Curves, Points
from stages.contracts.words import count, whole_percent


def training_page(progress: Progress, told: Curves | None, *, moment: datetime) -> str:
    """Markdown about a training under way."""
    step, steps, done = int(progress.done), int(progress.total), whole_percent(progress.share)
    rows = [("step", f"{count(step)} of {count(steps)}")]
    if told is not None:
        rows += [
            ("figures below", _of_step(told.loss, step)),
            ("loss", _course(told.loss)),
            ("held-out loss", _course(told.held_out)),
            ("learning rate", _last(told.lr, "{:.3g}")),
            ("gradient norm", _last(told.grad_norm, "{:.3g}")),
            ("throughput", _last(told.tokens_per_second, "{:,.0f} tokens/s")),
            ("peak memory", told_memory(told)),
        ]
    return page(
        f"## train, {done}",
        picture(progress_bar(progress.share), done),
        picture(loss_chart(told, last_step=steps), "the loss by step, so far"),
        facts(rows),
        f"As of {moment:%H:%M:%S} UTC. Changes every few seconds while training goes on: reload to see it.",
    )


def _of_step(points: Points, step: int) -> str:
    """Which step was logged last, where training is further: the line above the page tells of a later one."""
    last = points[-1][0] if points else step
    return f"as of step {count(last)}" if last < step else ""


def _course(points: Points) -> str:
    """From where to where, of the values there are."""
    values = [value for _, value in points if value is not None]
    if not values:
        return ""
    return f"{values[0]:.4f} → {values[-1]:.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _last(points: Points, form: str) -> str:
    value = points[-1][1] if points else None
    return "" if value is None else form.format(value)
