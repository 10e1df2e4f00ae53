"""Where pages are put: artifacts of a flow run in Prefect's UI, each made once and then changed in place.

Nobody waits for the server: a page is left here, and a thread of the board sends the newest of each key, at once or, of what
is under way, every few seconds. A server that is slow, hangs or is gone holds up nothing: what it did not take stays, is tried
again later, and once more when the run ends.

A change does not go through `update_progress_artifact` and its like: those also store the whole new content as an event, every
time, and a server keeps events for a week.
"""

import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.sorting import ArtifactSort
from prefect.logging import get_logger

from flows.server.client import impatient_client

Kind = Literal["markdown", "progress"]
Data = str | float | Callable[[], str]  # the last: made when it is sent

FIRST_SECONDS = 2.0  # before a page under way is sent: a node that is done by then has its last page at once
SECONDS = 5.0  # between two refreshes of a page
SHARE = 0.05  # of the time that refreshes may take; slower ones come less often
PATIENCE_SECONDS = 60.0  # after a server did not answer
LAST_SECONDS = 5.0  # that the end of a run waits for what is not sent yet


@dataclass(frozen=True)
class _Page:
    key: str
    kind: Kind
    data: Data
    words: str
    task_run_id: UUID | None


class Board:
    """The pages of one flow run, by their keys. Safe to use from many threads."""

    def __init__(self, flow_run_id: str | None) -> None:
        self._flow_run_id = UUID(flow_run_id) if flow_run_id else None
        self._ids: dict[str, UUID] = {}  # of the pages that the server has
        self._begun: set[str] = set()  # keys of which something was sent, or tried to
        self._final: set[str] = set()
        self._waiting: dict[str, _Page] = {}
        self._due: dict[str, float] = {}  # when a key is sent next
        self._pause = 0.0  # until then the server is left alone
        self._takes_up = False
        self._is_ending = False
        self._changed = threading.Condition()
        context = contextvars.copy_context()  # with Prefect's settings
        self._thread = threading.Thread(target=context.run, args=(self._send,), name="pages", daemon=True)

    def put(
        self, key: str, kind: Kind, data: Data, words: str, *, task_run_id: UUID | None = None, is_final: bool = False
    ) -> None:
        """Show a page, or what is new of it. Returns at once.

        Args:
            words: a line about it, which lists of pages show.
            task_run_id: of the task that it belongs to; None: it belongs to the flow.
            is_final: nothing comes after it; what was on its way before, and is late, is dropped.
        """
        with self._changed:
            if key in self._final or self._is_ending:
                return
            self._waiting[key] = _Page(key, kind, data, words, task_run_id)
            if is_final:
                self._final.add(key)
                self._due[key] = 0.0
            else:
                self._due.setdefault(key, time.monotonic() + FIRST_SECONDS)
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()

    def complete(self, key: str, words: str, *, task_run_id: UUID | None = None) -> None:
        """Show that all is done of what a page says is under way. Where there is none yet, there will be none."""
        with self._changed:
            if key in self._final:
                return
            self._waiting.pop(key, None)
            is_there = key in self._begun
        if is_there:
            self.put(key, "progress", 100.0, words, task_run_id=task_run_id, is_final=True)

    def take_up(self) -> None:
        """Change the pages that the run's own process has left, which is gone, instead of making others beside them."""
        self._takes_up = True

    def end(self) -> None:
        """Send what is not sent yet; wait a few seconds for that. Nothing can be put any more."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(LAST_SECONDS)

    def _send(self) -> None:
        """What the thread does, until the end."""
        logger, is_told = get_logger("finetune"), False
        while (page := self._next()) is not None:
            began = time.monotonic()
            try:
                self._deliver(page)
            except Exception as error:  # whatever is wrong with a page, it is not worth a run
                told = f"{type(error).__name__}: {error}"
                if not _is_away(error):
                    logger.warning("the page %s is not in the UI: %s", page.key, told)
                elif self._is_ending:
                    return
                else:
                    self._keep(page)
                    if not is_told:
                        logger.warning("pages in the UI cannot be refreshed for now: %s", told)
                    is_told = True
            with self._changed:
                if page.key not in self._final:
                    self._due[page.key] = time.monotonic() + max(SECONDS, (time.monotonic() - began) / SHARE)

    def _next(self) -> _Page | None:
        """The next page to send, once one is due; None: nothing comes any more."""
        with self._changed:
            while self._waiting or not self._is_ending:
                left = None
                if self._waiting:
                    key = min(self._waiting, key=self._due.__getitem__)
                    left = max(self._due[key], self._pause) - time.monotonic()
                    if left <= 0 or self._is_ending:
                        self._begun.add(key)
                        return self._waiting.pop(key)
                self._changed.wait(left)
        return None

    def _keep(self, page: _Page) -> None:
        """Try a page again later, unless there is a newer one by then."""
        with self._changed:
            self._waiting.setdefault(page.key, page)
            self._pause = time.monotonic() + PATIENCE_SECONDS
            self._takes_up = True  # it may have been made, and only the answer was lost

    def _deliver(self, page: _Page) -> None:
        data = page.data() if callable(page.data) else page.data
        with impatient_client() as client:
            if self._takes_up:
                self._ids |= _pages_of(client, self._flow_run_id)
                self._takes_up = False
            if (known := self._ids.get(page.key)) is not None:
                new = {"data": data, "description": page.words}
                client.request("PATCH", "/artifacts/{id}", json=new, path_params={"id": known}).raise_for_status()
                return
            made = client.create_artifact(
                ArtifactCreate(
                    key=page.key, type=page.kind, data=data, description=page.words,
                    flow_run_id=self._flow_run_id, task_run_id=page.task_run_id,
                )
            )  # fmt: skip
            self._ids[page.key] = made.id


def _is_away(error: Exception) -> bool:
    """Whether the server did not answer, rather than refuse a page."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _pages_of(client: SyncPrefectClient, flow_run_id: UUID | None) -> dict[str, UUID]:
    """The newest page of each key that a flow run has."""
    if flow_run_id is None:
        return {}
    asked = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    found = client.read_artifacts(artifact_filter=asked, sort=ArtifactSort.CREATED_DESC)
    return {page.key: page.id for page in reversed(found) if page.key is not None}
