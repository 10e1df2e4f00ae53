"""Containers and networks that a crash left: found by their labels, and removed at the next start.

A container whose launcher is gone ends by itself (see docker_container), so what is found has mostly ended; one that still
saves its work is waited for. Several runs that start at the same time may find the same.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docker.errors import APIError, NotFound

from flows.launch.docker_engine import TIMEOUT
from flows.launch.docker_refusals import refusals_told
from flows.launch.docker_request import LABEL
from flows.records.locks import Stopped
from flows.records.run_record import RunFolder

PROBE_SECONDS = 30  # that a look around may take in its container
DOCTOR_SECONDS = 4 * TIMEOUT + PROBE_SECONDS  # that a doctor has it: the engine makes, attaches, starts and removes it
REMOVAL_SECONDS = 60  # that the engine may take to remove one
LOOK_SECONDS = 0.2  # between two looks: the engine's own `wait` cannot be told from a lost connection when its time is over


def labels(*, workspace: Path, run: str, node: str, attempt: str, grace: float) -> dict[str, str]:
    """What marks a container, or a network, of ours, and says whose it is. A doctor's has no run."""
    marks = {
        "workspace": str(workspace), "run": run, "stage": node, "attempt": attempt, "machine": socket.gethostname(),
        "grace": str(grace), "asked": f"{time.time():.0f}",
    }  # fmt: skip
    return {LABEL + name: value for name, value in marks.items()}


def remove_leftovers(
    client: Any, host: str, workspace: Path, *, attempt: str, run: str, stop: threading.Event, say: Callable[[str], object]
) -> None:
    """Remove what runs of this workspace left that nobody does any more.

    Args:
        attempt: ours; what has it stays.
        run: the run that we do, whose earlier attempts are over.

    Raises:
        NotReady: the engine does not do it.
        Stopped: `stop` was set.
    """
    ours = {"label": [f"{LABEL}workspace={workspace}", f"{LABEL}machine={socket.gethostname()}"]}
    with refusals_told(host):
        for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
            if _is_left(container.labels, workspace, attempt, run):
                _remove(container, stop, say)
        for network in client.networks.list(filters=ours):
            if _is_left(network.attrs.get("Labels") or {}, workspace, attempt, run):
                with contextlib.suppress(APIError):  # another run removes it, or a container that still ends is in it
                    network.remove()


def _remove(container: Any, stop: threading.Event, say: Callable[[str], object]) -> None:
    if container.status == "running":
        say(f"waiting for {container.name}, which an earlier run left, to save its work and end")
        with contextlib.suppress(APIError):  # it has ended, or is gone
            container.kill("SIGTERM")
        _wait(container, stop, float(container.labels.get(f"{LABEL}grace", "30")) + 10)
    try:
        container.remove(force=True, v=True)
    except APIError as error:
        if error.status_code not in (404, 409):  # another run has removed it, or does it at this moment
            raise
    _wait(container, stop, REMOVAL_SECONDS, until_gone=True)


def _wait(container: Any, stop: threading.Event, seconds: float, *, until_gone: bool = False) -> None:
    """Until a container has ended, at most so long."""
    give_up = time.monotonic() + seconds
    with contextlib.suppress(NotFound):
        while time.monotonic() < give_up:
            container.reload()
            if container.status != "running" and not until_gone:
                return
            if stop.wait(LOOK_SECONDS):
                raise Stopped


def _is_left(labels: dict[str, str], workspace: Path, attempt: str, run: str) -> bool:
    if labels.get(f"{LABEL}attempt") == attempt:
        return False
    of = labels.get(f"{LABEL}run", "")
    if not of:
        return time.time() - float(labels.get(f"{LABEL}asked", "0")) > DOCTOR_SECONDS
    return of == run or not RunFolder(workspace, of).is_live()
