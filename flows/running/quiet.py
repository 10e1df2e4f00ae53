"""Prefect's own console logs, sent to a file of the run: its API has them too, and the terminal is for the run."""

import logging
from contextlib import suppress
from pathlib import Path

from prefect.logging.configuration import ensure_logging_setup


def logs_to_file(file: Path) -> None:
    """Replace every handler that writes to the terminal."""
    ensure_logging_setup()
    logging.raiseExceptions = False  # a log that cannot be written (a full disk) is nothing to fill the terminal with
    logging.getLogger("prefect.task_runs").addFilter(_is_news)
    handler = _LogFile(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s"))
    names = [None, *logging.root.manager.loggerDict]
    for logger in map(logging.getLogger, names):
        for old in list(logger.handlers):
            if isinstance(old, logging.StreamHandler) and not isinstance(old, logging.FileHandler):
                logger.removeHandler(old)
                logger.addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log that cannot be opened is not worth a run either."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that every task ran its hook, twice a task. A hook that failed is an error, and stays."""
    return record.levelno > logging.INFO or not record.getMessage().startswith(("Running hook ", "Hook "))
