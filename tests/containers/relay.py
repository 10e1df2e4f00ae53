"""Passing on what two sockets say to each other."""

import contextlib
import socket
import threading


def connect(theirs: socket.socket, ours: socket.socket) -> None:
    """Both ways, until either side has gone."""
    back = threading.Thread(target=_pass_on, args=[ours, theirs], daemon=True)
    back.start()
    _pass_on(theirs, ours)
    back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Until either side has gone; then both."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
