"""Output of a stage whose launcher may die: what nobody reads any more is dropped, and the work is ended in order all the same.

Without it the next line of progress would end training by a broken pipe, before it has saved a checkpoint.
"""

import io
import os
import sys
from typing import Any


class _Outlet(io.FileIO):
    """A pipe that may lose its reader."""

    def write(self, data: Any) -> int:
        """Write; into nothing where nobody reads."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno(), inheritable=True)  # for libraries and our children, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_the_reader() -> None:
    """Have this process's output go nowhere, instead of failing, once its reader is gone."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_Outlet(stream.fileno(), "w", closefd=False)), stream.encoding, stream.errors, line_buffering=True
        )
        for stream in (sys.stdout, sys.stderr)
    )
