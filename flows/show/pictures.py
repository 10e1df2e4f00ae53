"""The pictures of a run, as SVG: its loss, the lengths of its documents."""

from flows.show.charts import Bar, Series, bars, curves
from stages.contracts import artifacts as a
from stages.contracts.figures import length_rows
from stages.contracts.training_curves import Curves
from stages.contracts.words import count


def loss_chart(told: Curves | None, *, last_step: int | None = None, width: int = 640, height: int = 300) -> str | None:
    """The loss of the steps, and on held-out data; None where nothing is told."""
    if told is None:
        return None
    series = [Series("training", told.loss, "a"), Series("held-out data", told.held_out, "b", is_marked=True)]
    return curves(series, title="loss by step", last_x=last_step, width=width, height=height)


def histogram(dataset: a.DatasetArtifact, *, width: int = 640) -> str | None:
    """Documents by their number of tokens, of all sets."""
    rows = [Bar(label, 0, number, count(number)) for label, number in length_rows(dataset)]
    return bars(rows, title="documents by tokens", width=width)
