"""How far a stage is, shown while it runs: refreshed every few seconds, by a thread of its own.

A server that is slow or gone must not hold up hours of training, so nothing here waits for it: the stage's progress is left in
a slot, the thread takes the newest. When the server does not answer, the page stays as it is, and is tried again later.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self
from uuid import UUID

from flows.launch.protocol import Progress
from flows.records.run_record import now
from flows.show.pages.board import Board
from flows.show.pages.training import training_page
from stages.contracts.specs import Spec, TrainSpec
from stages.contracts.training_curves import read_curves

Show = Callable[[Progress], None]  # puts everything that there is to see of it; may raise

FIRST_SECONDS = 2.0  # a stage that is done by then has its page at once
SECONDS = 5.0  # between two refreshes
SHARE = 0.05  # of the time that refreshes may take; slower ones come less often
PATIENCE_SECONDS = 60.0  # after a server did not answer
LAST_SECONDS = 5.0  # that a stage's end waits for the last refresh


class Live:
    """Shows the progress of a stage while the `with` lasts."""

    def __init__(self, show: Show, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._show = show
        self._logger = logger
        self._newest: Progress | None = None
        self._shown: Progress | None = None
        self._is_over = threading.Event()
        context = contextvars.copy_context()  # Prefect's settings, and of which task run it is
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="live page", daemon=True)

    def update(self, progress: Progress) -> None:
        """Take in how far it is. Returns at once."""
        self._newest = progress

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join(LAST_SECONDS)

    def _watch(self) -> None:
        pause, is_told = FIRST_SECONDS, False
        while not self._is_over.wait(pause):
            pause = SECONDS
            if self._newest is self._shown or (progress := self._newest) is None:
                continue
            began = time.monotonic()
            try:
                self._show(progress)
                self._shown = progress
            except Exception as error:
                pause = PATIENCE_SECONDS
                if not is_told:
                    self._logger.warning("the page in the UI cannot be refreshed for now: %s", error)
                is_told = True
            else:
                pause = max(pause, (time.monotonic() - began) / SHARE)
        if self._shown is not None and self._newest is not self._shown:
            try:
                self._show(self._newest or self._shown)
            except Exception as error:
                self._logger.debug("the last state is not in the UI: %s", error)


def progress_key(node: str) -> str:
    """The key under which a node's progress is shown."""
    return f"{node}-progress"


def shown_on(board: Board, spec: Spec, task_run_id: UUID) -> Show:
    """Puts the progress of a stage on a board: how far it is, and of training a page with its curve."""
    node = spec.NODE

    def show(progress: Progress) -> None:
        percent = round(100 * progress.share, 1)
        board.put(progress_key(node), "progress", percent, progress.text, task_run_id=task_run_id)
        if isinstance(spec, TrainSpec):
            page = training_page(progress, read_curves(spec.scratch), moment=now())
            board.put(node, "markdown", page, progress.text, task_run_id=task_run_id)

    return show
