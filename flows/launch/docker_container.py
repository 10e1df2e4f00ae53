"""One container of a stage: made, attached to, started, listened to, asked to stop, removed.

We are attached before it starts, so no line is lost, and hold the other end of its standard input. When we are gone, however,
the engine closes that, and the shim in the container (`shim.py`) ends the stage, gracefully first. The first line that we send
is the part of the environment that must not be in the container's configuration.
"""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.errors import NotFound
from requests import RequestException

from flows.launch.docker_refusals import ENGINE_ERRORS
from flows.launch.output import LineSplitter

HEADER = 8  # bytes before each piece of output: the stream, 0, 0, 0, the piece's length
HOLD = Path(__file__).with_name("hold.py")
END_SECONDS = 10.0  # between the last output and the end
# Seconds of silence before the kernel asks whether the other side is there, between two such questions; how often it asks.
ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


@dataclass(frozen=True)
class Ending:
    """How a container ended."""

    code: int
    is_out_of_memory: bool = False  # the kernel killed something in it
    lost: str = ""  # why nothing is known of its end


class Container:
    """A container of a stage. Creating it starts it."""

    def __init__(self, client: Any, request: dict[str, Any], environment: dict[str, str]) -> None:
        """Create and start.

        Raises:
            ENGINE_ERRORS: the engine refuses; nothing is left of it.
        """
        self.name = str(request["name"])
        self.is_given_up = False
        self._api = client.api
        self._id = client.containers.create(**request).id
        try:
            self._socket = self._attached()
            self._api.start(self._id)
            self._socket.sendall(json.dumps(environment).encode() + b"\n")
        except BaseException:
            self.remove()
            raise

    def _attached(self) -> Any:
        params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        self._reader = self._api.attach_socket(self._id, params)  # kept: it closes when it is collected
        connection = getattr(self._reader, "_sock", self._reader)
        connection.settimeout(None)  # a stage may be silent for hours
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in ALIVE.items():
                if hasattr(socket, name):  # macOS has not all of them
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection

    def lines(self) -> Iterator[str]:
        """The output, both streams of it, until it ends or the connection breaks."""
        splitter, data = LineSplitter(), bytearray()
        while True:
            with contextlib.suppress(OSError):
                if piece := self._socket.recv(1 << 16):
                    data += piece
                    yield from self._unpacked(data, splitter)
                    continue
            break
        if rest := splitter.end():
            yield rest

    @staticmethod
    def _unpacked(data: bytearray, splitter: LineSplitter) -> Iterator[str]:
        """The lines in the pieces that are complete, which are taken from `data`."""
        while len(data) >= HEADER and len(data) >= (end := HEADER + int.from_bytes(data[4:HEADER], "big")):
            yield from splitter.feed(bytes(data[HEADER:end]))
            del data[:end]

    def hold(self, descriptors: tuple[int, ...]) -> None:
        """Keep files of ours open until it has ended, whatever becomes of us; where it runs on this machine."""
        with contextlib.suppress(*ENGINE_ERRORS):  # it has ended, or its end tells what is wrong
            pid = int(self._api.inspect_container(self._id)["State"]["Pid"])
            if descriptors and self._id in Path(f"/proc/{pid}/cgroup").read_text():
                command = [sys.executable, "-I", "-S", str(HOLD), str(pid)]
                process = subprocess.Popen(
                    command, pass_fds=descriptors, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                threading.Thread(target=process.wait, daemon=True).start()

    def ask_to_stop(self) -> None:
        """Send SIGTERM, which the shim passes on, once."""
        self._signal("SIGTERM")

    def kill(self) -> None:
        """End it at once."""
        self._signal("SIGKILL")

    def give_up(self) -> None:
        """End it, and its output at once: what waits for a disk that hangs cannot be killed."""
        self.is_given_up = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.kill()

    def _signal(self, name: str) -> None:
        with contextlib.suppress(*ENGINE_ERRORS):  # it has ended already; or the engine is gone, and ends it by itself
            self._api.kill(self._id, name)

    def ended(self, grace: float) -> Ending:
        """How it ended, once its output has.

        Where only our connection to it broke, the engine closes its input, and the shim in it ends the stage. After `grace`
        seconds it is killed.
        """
        try:
            if (state := self._state_after(END_SECONDS))["Running"]:
                lost = "the connection to its container broke"
                if (state := self._state_after(grace + END_SECONDS))["Running"]:
                    self.kill()
                    state = self._state_after(END_SECONDS)
            else:
                lost = ""
            return Ending(int(state["ExitCode"]), bool(state["OOMKilled"]), lost)
        except NotFound:
            return Ending(1, lost=f"its container {self.name} was removed from outside")
        except ENGINE_ERRORS as error:
            return Ending(1, lost=f"the Docker engine is gone: {error}")

    def _state_after(self, seconds: float) -> dict[str, Any]:
        """Its state, once it has ended, or after so long."""
        give_up = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RequestException):  # that long; or this connection broke, too
                self._api.wait(self._id, timeout=max(0.1, give_up - time.monotonic()))
            state: dict[str, Any] = self._api.inspect_container(self._id)["State"]
            if not state["Running"] or time.monotonic() > give_up:
                return state

    def remove(self) -> None:
        """End it, and forget it."""
        with contextlib.suppress(*ENGINE_ERRORS):
            self._api.remove_container(self._id, force=True, v=True)
        with contextlib.suppress(AttributeError, OSError):
            self._socket.close()
