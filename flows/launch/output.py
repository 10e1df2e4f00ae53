"""A stage's output on its way to people: cut into lines, stripped of secrets, its events told from its text."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stages.contracts.process import EVENT_PREFIX

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
HIDDEN = "[hidden]"

_BREAK = re.compile(rb"\r\n|\n|\r")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_LONGEST_LINE = 1 << 20  # bytes; what has no end by then is cut


class LineSplitter:
    """Bytes as they arrive, to lines. A carriage return ends a line too: progress bars redraw with it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that are complete with this piece."""
        text = self._rest + data
        # A trailing \r may be the first half of \r\n: it waits for the next piece.
        held = b"\r" if text.endswith(b"\r") else b""
        *lines, self._rest = _BREAK.split(text[: len(text) - len(held)])
        self._rest += held
        for line in lines:
            yield _decode(line)
        if len(self._rest) > _LONGEST_LINE:
            yield self.end()

    def end(self) -> str:
        """What is left without an end of line."""
        line, self._rest = self._rest, b""
        return _decode(line.rstrip(b"\r"))


def _decode(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").replace("\0", "")


class Redactor:
    """Replaces the values of secrets in text, and what looks like a token of the Hub."""

    def __init__(self, secrets: Iterable[str]) -> None:
        values = sorted({s for s in secrets if len(s) >= 6}, key=len, reverse=True)  # shorter ones are words
        self._pattern = re.compile("|".join(map(re.escape, values))) if values else None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Redactor":
        """One that knows the secrets of an environment."""
        return cls(environment.get(name, "").strip() for name in SECRETS)

    def __call__(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        return _HUB_TOKEN.sub(HIDDEN, text)


def parse_event(line: str) -> dict[str, Any] | None:
    """The event in a line of output, or None where the line is text. A malformed event is text, never an error."""
    if not line.startswith(EVENT_PREFIX):
        return None
    try:
        event = json.loads(line[len(EVENT_PREFIX) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def is_number(value: object) -> bool:
    """A finite number that JSON can carry."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
