"""On PYTHONPATH, watches every Python process that starts: its command line goes to `began.log` here, and the addresses it
connects to or asks for to `connects.log`.
"""

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CONNECTS = FOLDER / "connects.log"


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = arguments[1]
        where = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else f"unix:{address!r}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        where = str(arguments[0])
    else:
        return
    with CONNECTS.open("a") as log:
        log.write(f"{event} {where} {' '.join(sys.orig_argv[:5])}\n")


with (FOLDER / "began.log").open("a") as log:
    log.write(f"{' '.join(sys.orig_argv)!r}\n")  # a line each, whatever is in it
sys.addaudithook(_watch)
