"""What training tells of itself: a line for people, a line of JSON and TensorBoard scalars every few steps, and how far it is.

`metrics.jsonl` holds one object per line: `{"step", "loss", "lr", "grad_norm", "tokens", "tokens_read", "seconds", …}` for the
steps since the line before, with `loss_scale` and `batch_size` where these may change, `memory`, the most bytes that a process
has held (any of them; of its GPU, or of the machine), and `data_wait_share`, the share of these seconds spent waiting for data;
`{"step", "valid_loss", "valid_perplexity", "valid_accuracy", …, "eval_seconds"}` for an evaluation (`Sums.metrics`), `test_…`
for that of the test split. A figure that is not finite, or that there is not, is null.

There are two numbers of tokens. `tokens` are those that count: labels with a weight above 0, each of them one whatever its
weight. `tokens_read` are all that went through the model, padding and what no loss counts included. A loss is divided by
neither, but by the sum of the weights.

Importing this module loads no torch; making a `Journal` that writes does.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True)
class Report:
    """Whom training talks to. The default says nothing."""

    log: Callable[[str], None] = lambda line: None  # a line for people
    warn: Callable[[str], None] = lambda line: None  # a line that deserves a look
    progress: Callable[[float, float, str], None] = lambda done, total, text: None  # may be called at every step


class Sums(NamedTuple):
    """Sums over the tokens of an evaluation, from which its metrics follow. Those of several batches simply add up (`total`).

    A token counts when its label has a weight above 0.
    """

    loss: float = 0.0  # of weight × loss
    weight: float = 0.0
    tokens: int = 0  # counted
    correct: int = 0  # of those, how many labels no other id is likelier than
    answer_tokens: int = 0  # counted ones of an answer: its text and its end, not its header
    answer_correct: int = 0

    @property
    def mean_loss(self) -> float:
        """The loss, weighted over tokens; nan without any."""
        return self.loss / self.weight if self.weight else math.nan

    @property
    def accuracy(self) -> float:
        """The share of the counted tokens that the model would have chosen itself."""
        return self.correct / self.tokens if self.tokens else math.nan

    @property
    def instruct_accuracy(self) -> float:
        """The same of the tokens of answers; nan where there are none, as in text."""
        return self.answer_correct / self.answer_tokens if self.answer_tokens else math.nan

    def metrics(self) -> dict[str, float]:
        """All of them by name, those of answers only where there are some."""
        of_all = {
            "loss": self.mean_loss, "perplexity": perplexity(self.mean_loss), "accuracy": self.accuracy,
            "loss_tokens": self.tokens,
        }  # fmt: skip
        if not self.answer_tokens:
            return of_all
        return of_all | {"instruct_accuracy": self.instruct_accuracy, "answer_tokens": self.answer_tokens}


def total(sums: Iterable[Sums]) -> Sums:
    """The sums of all batches together."""
    return Sums(*map(sum, zip(Sums(), *sums, strict=True)))


class Journal:
    """Keeps the record of a run: means over the steps since the last line, written every `log_interval` steps and at the end.

    Only the rank with `folder` writes and talks; on the others a journal does nothing. A run that goes on from step n drops
    what an interrupted one wrote after step n, so that no step appears twice.
    """

    def __init__(self, folder: Path | None, report: Report, *, steps: int, log_interval: int, resume_step: int) -> None:
        self.steps = steps
        self.log_interval = log_interval
        self._writer = MetricsWriter(folder, resume_step=resume_step) if folder is not None else None
        self._report = report if folder is not None else Report()
        self._window = Window()
        self._seconds_per_step = 0.0
        self._tokens_per_second = 0.0

    def is_due(self, step: int) -> bool:
        """Whether a line is written after a step: the same answer on every rank."""
        return step % self.log_interval == 0 or step == self.steps

    def step(
        self,
        step: int,
        *,
        loss: float,
        weight: float,
        tokens: int,
        read: int,
        seconds: float,
        waited: float = 0.0,
        lr: float,
        grad_norm: float | None,
        loss_scale: float | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Take in a finished step: its loss, its time.

        Args:
            weight: what the loss is a mean over; 0: nothing was learnt.
            tokens: those that count.
            read: tokens that went through the model, padding and what no loss counts included: the speed is theirs.
            waited: how many of the seconds were spent waiting for data.
            grad_norm: not finite: the step was skipped for that; None: it was not meant to update anything.
            loss_scale, batch_size: given where they may change from step to step.
            memory: the most bytes that any process has held; wanted where a line is due.
        """
        window = self._window
        is_skipped = grad_norm is not None and not math.isfinite(grad_norm)
        window.add(loss=loss, weight=weight, tokens=tokens, read=read, seconds=seconds, waited=waited, is_skipped=is_skipped)
        # A mean that forgets: steady enough to read, and right again soon after the machine's pace changed.
        self._seconds_per_step = 0.9 * self._seconds_per_step + 0.1 * seconds if self._seconds_per_step else seconds
        seconds_left = (self.steps - step) * self._seconds_per_step
        left = duration(seconds_left)
        if self.is_due(step) or not self._tokens_per_second:
            self._tokens_per_second = window.tokens_per_second
        self._report.progress(
            step,
            self.steps,
            f"step {step}/{self.steps} · {_told(loss, weight, '.4g')} · {self._tokens_per_second:,.0f} tokens/s · {left} left",
        )
        if self.is_due(step):
            parts = [
                _told(window.loss, window.weight, ".4f"),
                f"lr {lr:.2e}",
                f"grad norm {grad_norm:.3g}" if grad_norm is not None else "no update, as skip_steps asks",
                f"loss scale {loss_scale:g}" if loss_scale is not None else "",
                f"batch {batch_size}" if batch_size is not None else "",
                f"{window.tokens_per_second:,.0f} tokens/s",
                f"{left} left",
                f"{window.skipped_steps} of {window.steps} steps skipped" if window.skipped_steps else "",
            ]
            self._report.log(" · ".join(filter(None, [self._place(step), *parts])))
            vary = {
                name: value
                for name, value in (("loss_scale", loss_scale), ("batch_size", batch_size), ("memory", memory))
                if value is not None
            }
            self._write(
                step, loss=window.loss, lr=lr, grad_norm=math.nan if grad_norm is None else grad_norm, tokens=window.tokens,
                tokens_read=window.read,
                seconds=round(window.seconds, 4), tokens_per_second=round(window.tokens_per_second, 1),
                seconds_left=round(seconds_left, 1), skipped_steps=window.skipped_steps,
                data_wait_share=round(window.waited / window.seconds, 5) if window.seconds else 0.0, **vary,
            )  # fmt: skip
            self._window = Window()

    def evaluation(self, step: int, found: "Sums", *, seconds: float = 0.0, split: Literal["valid", "test"] = "valid") -> None:
        """Take in what the model is worth on held-out samples after a step, and how long it took to find out."""
        name = "held-out" if split == "valid" else split
        answers = f" ({found.instruct_accuracy:.1%} of answers' tokens)" if found.answer_tokens else ""
        self._report.log(
            f"{self._place(step)} · {name} loss {found.mean_loss:.4f} · perplexity {perplexity(found.mean_loss):,.4g} · "
            f"next token right {found.accuracy:.1%}{answers}"
        )
        figures = {f"{split}_{metric}": value for metric, value in found.metrics().items()}
        self._write(step, **figures, eval_seconds=round(seconds, 4))

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self.steps))}}/{self.steps}"

    def _write(self, step: int, **values: float) -> None:
        if self._writer is not None:
            self._writer.write(step, **values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


class Window:
    """Sums over the steps since the last line of the log."""

    def __init__(self) -> None:
        self.steps = 0
        self.skipped_steps = 0
        self.weight = 0.0
        self.tokens = 0
        self.read = 0
        self.seconds = 0.0
        self.waited = 0.0
        self._finite_weight = 0.0
        self._loss_sum = 0.0

    def add(
        self, *, loss: float, weight: float, tokens: int, read: int, seconds: float, is_skipped: bool, waited: float = 0.0
    ) -> None:  # fmt: skip
        self.steps += 1
        self.skipped_steps += is_skipped
        self.weight += weight
        self.tokens += tokens
        self.read += read
        self.seconds += seconds
        self.waited += waited
        if math.isfinite(loss):
            self._finite_weight += weight
            self._loss_sum += loss * weight

    @property
    def loss(self) -> float:
        """Mean over the tokens of the window, by their weights; nan when no step of it had any and a finite loss."""
        return self._loss_sum / self._finite_weight if self._finite_weight else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.read / self.seconds if self.seconds else 0.0


def _told(loss: float, weight: float, form: str) -> str:
    """A loss, for people. Of no weight there is none, and nothing is wrong."""
    return f"loss {loss:{form}}" if weight else "no loss, as no token counts"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's files in a folder."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # loads torch, and takes a second

        kept = [line for line in read_metrics(folder) if resume_step and line["step"] <= resume_step]
        new = folder / f"{METRICS_FILE}.tmp"
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.rename(folder / METRICS_FILE)
        self._file = (folder / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, **values: float) -> None:
        """One line, and one TensorBoard scalar for each value."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()  # a killed run keeps its lines
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's `metrics.jsonl`, none if there is no such file. A half-written last line is left out."""
    try:
        text = (folder / METRICS_FILE).read_text()
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def downsample(points: Sequence[tuple[int, float]], limit: int = 200) -> list[tuple[int, float]]:
    """At most `limit` points of a curve, evenly spaced, the first and the last among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def perplexity(loss: float) -> float:
    """e^loss, cut at e^20 as the reference does, so that an untrained model has a figure too."""
    return math.exp(20.0 if loss > 20 else loss)


def duration(seconds: float) -> str:
    """A time as a person reads it: 4s, 3m 12s, 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
