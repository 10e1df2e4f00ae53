"""Keeps open what it inherited while a process lives: locks of a launcher that is gone, while its container still ends. Run as
a script, with the standard library only:

    python hold.py PID
"""

import contextlib
import os
import select
import sys


def main(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        waiting = select.poll()
        waiting.register(os.pidfd_open(pid), select.POLLIN)
        waiting.poll()


if __name__ == "__main__":
    main(int(sys.argv[1]))
