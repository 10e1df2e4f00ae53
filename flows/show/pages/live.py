"""How far a stage is, shown while it runs: as a number, and of training as a page with its curve."""

from collections.abc import Callable
from uuid import UUID

from flows.launch.protocol import Progress
from flows.records.run_record import now
from flows.show.pages.board import Board
from flows.show.pages.training import training_page
from stages.contracts.specs import Spec, TrainSpec
from stages.contracts.training_curves import curves_in


def progress_key(node: str) -> str:
    """The key under which a node's progress is shown."""
    return f"{node}-progress"


def shown_on(board: Board, spec: Spec, task_run_id: UUID) -> Callable[[Progress], None]:
    """Puts the progress of a stage on a board."""

    def show(progress: Progress) -> None:
        percent = round(100 * progress.share, 1)
        board.put(progress_key(spec.NODE), "progress", percent, progress.text, task_run_id=task_run_id)
        if isinstance(spec, TrainSpec):
            board.put(
                spec.NODE, "markdown", lambda: training_page(progress, curves_in(spec.scratch), moment=now()), progress.text,
                task_run_id=task_run_id,
            )  # fmt: skip

    return show
