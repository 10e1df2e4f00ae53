"""On PYTHONPATH, watches every Python process that starts: the addresses it connects to or asks for, in `connects.log` here."""

import sys
from pathlib import Path
from typing import Any

LOG = Path(__file__).with_name("connects.log")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = arguments[1]
        where = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else f"unix:{address!r}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        where = str(arguments[0])
    else:
        return
    with LOG.open("a") as log:
        log.write(f"{event} {where} {' '.join(sys.argv[:4])}\n")


sys.addaudithook(_watch)
