"""What a crash left, with real containers: who removes it, and who does not."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripted import containers_of

from flows.launch.docker_engine import default_host
from flows.launch.docker_leftovers import labels, remove_leftovers

AT_ONCE = 4  # runs that start


def test_several_runs_that_start_at_once_remove_the_same(client: Any, workspace: Path) -> None:
    """To the second one the engine says that a removal is in progress, and to the third that there is no such container."""
    marks = labels(workspace=workspace, run="gone", node="train", attempt=uuid.uuid4().hex, grace=0.0)
    for _ in range(3):
        client.containers.create("megatron-flows:cpu", ["true"], labels=marks)
    start = threading.Barrier(AT_ONCE)

    def remove(number: int) -> list[Any]:
        start.wait()
        asked = {"attempt": f"ours-{number}", "run": f"run-{number}", "stop": threading.Event(), "say": print}
        remove_leftovers(client, default_host(), workspace, **asked)
        return containers_of(client, workspace)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(remove, range(AT_ONCE))) == [[]] * AT_ONCE
