"""The files of an input against the digests that its artifact records, in threads beside the stage's own work.

Hashing releases Python's lock: an input that is hashed while its tensors are copied, or while PyTorch is imported, costs cores
and no time. Nothing is published before the check has ended.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread

from stages.contracts import artifacts as a
from stages.contracts import intact

MOST_THREADS = 8
SWITCH_SECONDS = 0.0002  # that a thread waits before it takes the interpreter from another, while something is imported


class InputCheck:
    """Begins to hash the files of an artifact. Its threads do not keep the process alive, so a stage can be stopped at once.

    Args:
        folder: of the artifact; files that are missing or have another size are refused right away.

    Raises:
        DamagedArtifact: naming such a file.
    """

    def __init__(self, folder: Path, artifact: a.Artifact) -> None:
        self._folder, self._artifact = folder, artifact
        for name in artifact.files:
            intact.check_size(folder, artifact, name)
        largest_first = sorted(artifact.files, key=lambda name: -artifact.files[name].size)
        self._names: Iterator[str] = iter(largest_first)
        self._lock = Lock()
        self._damage: list[Exception] = []
        count = min(MOST_THREADS, len(os.sched_getaffinity(0)), len(largest_first))
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Return when all files are as recorded.

        Raises:
            DamagedArtifact: naming a file that is not.
        """
        for thread in self._threads:
            thread.join()
        if self._damage:
            raise self._damage[0]

    def _run(self) -> None:
        while not self._damage:
            with self._lock:
                name = next(self._names, None)
            if name is None:
                return
            try:
                intact.check_content(self._folder, self._artifact, name)
            except Exception as error:
                self._damage.append(error)


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of something large while inputs are hashed.

    The threads that hash get their turn at once: otherwise each block of theirs waits 5 ms for the interpreter, longer than it
    takes. And no garbage is looked for, as there is none, then or later: with PyTorch that search is a fifth of the time.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        sys.setswitchinterval(interval)
