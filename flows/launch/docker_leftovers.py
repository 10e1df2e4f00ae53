"""Containers and networks that a crash left: found by their labels, and removed at the next start.

A container whose launcher is gone ends by itself (see docker_container), so what is found has mostly ended; one that still
saves its work is waited for.
"""

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docker.errors import APIError, NotFound

from flows.launch.docker_container import wait_until_ended
from flows.launch.docker_request import LABEL
from flows.records.run_record import RunFolder


def labels(*, workspace: Path, run: str, node: str, attempt: str, grace: float) -> dict[str, str]:
    """What marks a container, or a network, of ours, and says whose it is."""
    return {
        "workspace": str(workspace), "run": run, "stage": node, "attempt": attempt, "machine": socket.gethostname(),
        "grace": str(grace),
    }  # fmt: skip


def remove_leftovers(client: Any, workspace: Path, attempt: str, run: str, say: Callable[[str], None]) -> list[str]:
    """Remove what runs of this workspace left that nobody does any more. Returns the names of the containers.

    Args:
        attempt: ours; what has it stays.
        run: the run that we do, whose earlier attempts are over.
    """
    ours = {"label": [f"{LABEL}workspace={workspace}", f"{LABEL}machine={socket.gethostname()}"]}
    removed = []
    for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
        if not _is_left(container.labels, workspace, attempt, run):
            continue
        removed.append(container.name)
        with contextlib.suppress(NotFound):
            if container.status == "running":
                say(f"waiting for {container.name}, which an earlier run left, to save its work and end")
                with contextlib.suppress(APIError):
                    container.kill("SIGTERM")
                wait_until_ended(container, float(container.labels.get(f"{LABEL}grace", "30")) + 10)
            container.remove(force=True, v=True)
    for network in client.networks.list(filters=ours):
        if _is_left(network.attrs.get("Labels") or {}, workspace, attempt, run):
            with contextlib.suppress(APIError):
                network.remove()
    return removed


def _is_left(labels: dict[str, str], workspace: Path, attempt: str, run: str) -> bool:
    if labels.get(f"{LABEL}attempt") == attempt:
        return False
    of = labels.get(f"{LABEL}run", "")
    return of == run or not RunFolder(workspace, of).is_live()
