"""Where pages are put: artifacts of a flow run in Prefect's UI, each made once and then changed in place.

A change does not go through `update_progress_artifact` and its like: those also store the whole new content as an event, every
time, and a server keeps events for a week.
"""

import threading
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate

Kind = Literal["markdown", "progress"]

SECONDS = 15.0  # that a request may take: nobody waits for one


class Board:
    """The pages of one flow run, by their keys. Safe to use from many threads."""

    def __init__(self, flow_run_id: str | None) -> None:
        self._flow_run_id = UUID(flow_run_id) if flow_run_id else None
        self._ids: dict[str, UUID] = {}
        self._final: set[str] = set()
        self._lock = threading.Lock()

    def has(self, key: str) -> bool:
        """Whether there is a page under a key."""
        return key in self._ids

    def put(
        self, key: str, kind: Kind, data: str | float, words: str, *, task_run_id: UUID | None = None, is_final: bool = False
    ) -> None:
        """Show a page, or what is new of it.

        Args:
            words: a line about it, which lists of pages show.
            task_run_id: of the task that it belongs to; None: it belongs to the flow.
            is_final: nothing comes after it; what was on its way before, and is late, is dropped.

        Raises:
            Exception: the server does not answer, or refuses it.
        """
        with self._lock, _client() as client:
            if key in self._final:
                return
            if is_final:
                self._final.add(key)
            if (known := self._ids.get(key)) is not None:
                client.request(
                    "PATCH", "/artifacts/{id}", json={"data": data, "description": words}, path_params={"id": known}
                ).raise_for_status()
                return
            made = client.create_artifact(
                ArtifactCreate(
                    key=key, type=kind, data=data, description=words, flow_run_id=self._flow_run_id, task_run_id=task_run_id
                )
            )
            self._ids[key] = made.id


def _client() -> SyncPrefectClient:
    return get_client(httpx_settings={"timeout": SECONDS}, sync_client=True)
