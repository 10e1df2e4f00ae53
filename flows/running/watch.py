"""Beside every run a process waits for the run's own to die, however it dies, and then settles what it left.

It is a shell that reads from a pipe which the kernel closes with us: it costs nothing while it waits. So no task stays
`Running` after its process is gone, whether or not a runner is there to see it. `settle.py` says what it does then.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from flows.launch.environment import python_path
from flows.records.run_record import RunFolder


@contextlib.contextmanager
def watched(folder: RunFolder, flow_run_id: str, attempt: int, holds: Sequence[int] = ()) -> Iterator[None]:
    """Have this process watched while it does a run.

    Args:
        holds: descriptors of locks that must outlast us until the run is settled: of the server that is told of it.
    """
    run = [str(folder.workspace), folder.name, flow_run_id, str(attempt)]
    settle = [sys.executable, "-P", "-m", "flows.running.settle", *run]
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; exec "$@"', "watcher", *settle],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": python_path(os.environ)},
        start_new_session=True,  # what kills our process group leaves it
        pass_fds=holds,
    )
    try:
        yield
    finally:
        watcher.kill()  # before its pipe is closed: there is nothing to settle
        watcher.communicate()
