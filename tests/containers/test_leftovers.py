"""What a crash left, with real containers: who removes it, and who does not."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripted import containers_of

from flows.launch.docker_engine import default_host
from flows.launch.docker_leftovers import labels, remove_leftovers
from flows.launch.docker_request import LABEL
from flows.records.run_record import RunFolder

AT_ONCE = 4  # runs that start


def labels_of(workspace: Path, run: str) -> dict[str, str]:
    return labels(workspace=workspace, run=run, node="train", attempt=uuid.uuid4().hex, grace=0.0)


def remove(client: Any, workspace: Path, run: str) -> None:
    """What a run does before its first container."""
    asked = {"attempt": f"of-{run}", "run": run, "stop": threading.Event(), "say": print}
    remove_leftovers(client, default_host(), workspace, **asked)


def test_several_runs_that_start_at_once_remove_the_same(client: Any, workspace: Path) -> None:
    """To the second one the engine says that a removal is in progress, and to the third that there is no such container."""
    marks = labels_of(workspace, "gone")
    for _ in range(3):
        client.containers.create("megatron-flows:cpu", ["true"], labels=marks)
    start = threading.Barrier(AT_ONCE)

    def left_after(number: int) -> list[Any]:
        start.wait()
        remove(client, workspace, f"run-{number}")
        return containers_of(client, workspace)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(left_after, range(AT_ONCE))) == [[]] * AT_ONCE


def test_networks_of_trainings_over_several_machines(client: Any, workspace: Path) -> None:
    """That of a run that is gone is removed by the next one; that of a run that goes on is not."""

    def left() -> list[str]:
        return [network.name for network in client.networks.list(filters={"label": f"{LABEL}workspace={workspace}"})]

    for run in ("gone", "live"):
        client.networks.create(f"{run}-{workspace.name}", internal=True, labels=labels_of(workspace, run))
    with RunFolder(workspace, "live").held():
        remove(client, workspace, "next")
        assert left() == [f"live-{workspace.name}"]
    remove(client, workspace, "next")
    assert left() == []
