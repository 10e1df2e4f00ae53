"""A run looks itself whether it was cancelled in Prefect: a runner sees that of runs that it started, and of no others."""

import contextvars
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect.exceptions import ObjectNotFound

from flows.server.client import AWAY, impatient_client

LOOK_SECONDS = 5.0


@contextmanager
def heeded(flow_run_id: str | None) -> Iterator[threading.Event]:
    """Have this process get a SIGTERM once its flow run is cancelled, while this lasts. Yields whether that has happened."""
    is_cancelled, ended = threading.Event(), threading.Event()

    def look(flow_run: UUID) -> None:
        while not ended.wait(LOOK_SECONDS):
            # Away, or deleted, or what answers is no server of Prefect: the run goes on.
            with suppress(*AWAY, ObjectNotFound, ValueError):
                if _was_cancelled(flow_run) and not ended.is_set():
                    is_cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    if flow_run_id is not None:
        context = contextvars.copy_context()  # with Prefect's settings
        threading.Thread(target=context.run, args=(look, UUID(flow_run_id)), name="cancelled", daemon=True).start()
    try:
        yield is_cancelled
    finally:
        ended.set()


def _was_cancelled(flow_run: UUID) -> bool:
    """Cancelled, too: so Prefect calls, after some minutes, what nobody has ended."""
    with impatient_client() as client:
        state = client.read_flow_run(flow_run).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
