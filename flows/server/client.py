"""Prefect's client for who asks on the side, while a run goes on, and must not be held up by a server that hangs."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

REQUEST_SECONDS = 15.0  # that a request may take
AWAY = (httpx.HTTPError, PrefectHTTPStatusError, OSError)  # what Prefect's client raises where its server does not answer


@contextmanager
def impatient_client() -> Iterator[SyncPrefectClient]:
    """A client that asks once: by default it asks a server that hangs five times more."""
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": REQUEST_SECONDS}, sync_client=True) as client,
    ):
        yield client
