"""A run looks itself whether it was cancelled in Prefect: a runner sees that of runs that it started, and of no others."""

import contextvars
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

LOOK_SECONDS = 5.0
REQUEST_SECONDS = 15.0


@contextmanager
def heeded(flow_run_id: str | None) -> Iterator[threading.Event]:
    """Have this process get a SIGTERM once its flow run is cancelled, while this lasts. Yields whether that has happened."""
    is_cancelled, ended = threading.Event(), threading.Event()

    def look(flow_run: UUID) -> None:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            while not ended.wait(LOOK_SECONDS):
                with suppress(httpx.HTTPError, PrefectHTTPStatusError, ObjectNotFound):  # away, or deleted: the run goes on
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
    with get_client(httpx_settings={"timeout": REQUEST_SECONDS}, sync_client=True) as client:
        state = client.read_flow_run(flow_run).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
