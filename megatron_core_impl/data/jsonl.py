"""Text in JSON lines: byte ranges of a file to lines, a line to its text, or to the reason why it has none."""

import json
from pathlib import Path
from typing import Any


class MalformedLine(ValueError):
    """A line without a usable text; the message is the reason."""


def read_lines(file: Path, start: int, stop: int) -> list[bytes]:
    """The lines that begin in bytes start … stop-1, without their ends.

    Ranges that tile a file give each of its lines exactly once, in order. Lines end with \\n and nothing else: other line
    separators of Unicode may stand inside JSON.
    """
    with file.open("rb") as source:
        if start:
            source.seek(start - 1)
            source.readline()  # the rest of a line that begins before the range; just \n where none does
        position = source.tell()
        if position >= stop:
            return []
        block = source.read(stop - position)
        if not block.endswith(b"\n"):
            block += source.readline()
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def text_of(line: bytes, key: str = "text") -> str:
    """The text of a line `{"text": "…", …}`.

    Raises:
        MalformedLine: with the reason.
    """
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedLine(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        if not line.strip():
            raise MalformedLine("empty line") from None
        raise MalformedLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise MalformedLine(f"not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedLine(f"{_name(content)}, not an object")
    if key not in content:
        raise MalformedLine(f'no key "{key}"')
    text = content[key]
    if not isinstance(text, str):
        raise MalformedLine(f'"{key}" is {_name(text)}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise MalformedLine(
            f'"{key}" is no valid Unicode: {half} at character {error.start + 1} is half of a surrogate pair'
        ) from None
    return text


def _name(value: Any) -> str:
    """What JSON calls a value."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
