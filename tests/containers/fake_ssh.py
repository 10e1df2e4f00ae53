"""A stand-in for `ssh -N -L HERE:REMOTE MACHINE`, whose machine is this one: what connects to the socket HERE is connected to
the socket REMOTE, for as long as this runs."""

import socket
import sys
import threading
from pathlib import Path

from relay import connect


def serve(here: str, remote: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{here}.new")
        server.listen()
        Path(f"{here}.new").rename(here)  # it is there once it answers
        while True:
            theirs, _ = server.accept()
            ours = socket.socket(socket.AF_UNIX)
            ours.connect(remote)
            threading.Thread(target=connect, args=[theirs, ours], daemon=True).start()


def install(folder: Path) -> None:
    """Make an `ssh` in a folder, for PATH."""
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).absolute()} "$@"\n')
    (folder / "ssh").chmod(0o755)


if __name__ == "__main__":
    serve(*sys.argv[sys.argv.index("-L") + 1].split(":"))
