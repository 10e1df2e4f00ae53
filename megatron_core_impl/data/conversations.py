"""Records of the formats in which conversations are passed around, as lists of messages.

| format | a record | who speaks |
|---|---|---|
| `messages` | `{"messages": [{"role", "content", "weight"?}, …]}`, as OpenAI | system (developer), user, assistant, tool |
| `sharegpt` | `{"conversations": [{"from", "value", "weight"?}, …], "system"?}` | see `SHAREGPT_SPEAKERS` |
| `alpaca` | `{"instruction", "input"?, "output"}` | the first two are the user's, an empty line between them |
| `question-answer` | `{"system"?, "question", "answer"}`, as in Megatron-LLM's guide | |

`columns` names the keys of a record where they differ: `{"question": "prompt"}`. A `system` key named there must be in every
record. A message's `weight` is what its tokens count in the loss beside the weight of who says it; without one it is 1. Its
text may be a list of parts, all of them text, as OpenAI's. Calls of tools are not taught: a record with them is malformed, and
not a conversation in which they are missing.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from megatron_core_impl.data.records import MalformedRecord, Record

Format = Literal["messages", "sharegpt", "alpaca", "question-answer"]
Speaker = Literal["system", "user", "assistant", "tool"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question-answer": ("question", "answer"),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",), "sharegpt": ("system", "tools"), "alpaca": ("input",), "question-answer": ("system",),
}  # fmt: skip
SPEAKERS: dict[str, Speaker] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
SHAREGPT_SPEAKERS: dict[str, Speaker] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
CALLS = ("tool_calls", "function_call")  # of a message


class Message(NamedTuple):
    """What one side says."""

    role: Speaker
    text: str
    weight: float | None = None  # what its tokens count; None: the record does not say, which is 1


def keys_of(format: Format, columns: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that are read of a record, and those of them that each must have.

    Raises:
        ValueError: `columns` names a part that the format does not have.
    """
    parts = REQUIRED[format] + OPTIONAL[format]
    if unknown := sorted(set(columns) - set(parts)):
        raise ValueError(f"columns names {unknown[0]!r}, which format {format} does not have. It has: {', '.join(parts)}")
    required = [part for part in parts if part in REQUIRED[format] or (part == "system" and part in columns)]
    return tuple(columns.get(part, part) for part in parts), tuple(columns.get(part, part) for part in required)


def read_conversation(record: Record, format: Format, columns: Mapping[str, str] | None = None) -> list[Message]:
    """The messages of a record. At least one is the assistant's.

    Raises:
        MalformedRecord: with the reason.
    """
    columns = columns or {}
    match format:
        case "messages":
            _refuse_tools(record, columns.get("tools", "tools"))
            messages = _read_list(record, columns.get("messages", "messages"), "role", "content", SPEAKERS)
        case "sharegpt":
            _refuse_tools(record, columns.get("tools", "tools"))
            messages = _read_list(record, columns.get("conversations", "conversations"), "from", "value", SHAREGPT_SPEAKERS)
            if system := _system(record, columns):
                if any(message.role == "system" for message in messages):
                    raise MalformedRecord(f'"{columns.get("system", "system")}" and a message of the system: which one counts?')
                messages.insert(0, Message("system", system))
        case "alpaca":
            question = _text(record, columns.get("instruction", "instruction"))
            context = columns.get("input", "input")
            if record.get(context) is not None and (given := _text(record, context)).strip():
                question += f"\n\n{given}"
            messages = [Message("user", question), Message("assistant", _text(record, columns.get("output", "output")))]
        case "question-answer":
            messages = [
                Message("user", _text(record, columns.get("question", "question"))),
                Message("assistant", _text(record, columns.get("answer", "answer"))),
            ]
            if (system := _system(record, columns)) is not None:
                messages.insert(0, Message("system", system))
    if not any(message.role == "assistant" for message in messages):
        raise MalformedRecord("no message of the assistant, so nothing to learn")
    return messages


def _system(record: Record, columns: Mapping[str, str]) -> str | None:
    """The system message that a record has beside its messages."""
    key = columns.get("system", "system")
    return _text(record, key) if "system" in columns or record.get(key) is not None else None


def _refuse_tools(record: Record, key: str) -> None:
    if record.get(key) not in (None, "", "[]", []):
        raise MalformedRecord(f'"{key}" describes tools, which are not taught here. Write them into a system message instead')


def _read_list(record: Record, key: str, role_key: str, text_key: str, speakers: Mapping[str, Speaker]) -> list[Message]:
    found = _value(record, key, "")
    if not isinstance(found, list | tuple):
        raise MalformedRecord(f'"{key}" is {_kind(found)}, not a list of messages')
    messages = []
    for number, message in enumerate(found, 1):
        where = f"message {number}: "
        if not isinstance(message, Mapping):
            raise MalformedRecord(f"{where}{_kind(message)}, not an object")
        role = _value(message, role_key, where)
        if not isinstance(role, str) or role not in speakers:
            raise MalformedRecord(f'{where}"{role_key}" is {role!r}; known are {", ".join(speakers)}')
        if called := [key for key in CALLS if message.get(key)]:
            raise MalformedRecord(
                f'{where}"{called[0]}" calls a tool, which is not taught here. Write the call into "{text_key}" instead'
            )
        messages.append(Message(speakers[role], _text_of_parts(message, text_key, where), _weight(message, where)))
    return messages


def _text_of_parts(message: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a message, which may be given in parts."""
    parts = message.get(key)
    if not isinstance(parts, list | tuple):
        return _text(message, key, where)
    texts = []
    for number, part in enumerate(parts, 1):
        of_part = f'{where}part {number} of "{key}": '
        if not isinstance(part, Mapping):
            raise MalformedRecord(f"{of_part}{_kind(part)}, not an object")
        if (kind := _value(part, "type", of_part)) != "text":
            raise MalformedRecord(f"{of_part}its type is {kind!r}; only text can be learnt")
        texts.append(_text(part, "text", of_part))
    return "".join(texts)


def _text(record: Mapping[str, Any], key: str, where: str = "") -> str:
    """A string that can be written as UTF-8."""
    text = _value(record, key, where)
    if not isinstance(text, str):
        raise MalformedRecord(f'{where}"{key}" is {_kind(text)}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise MalformedRecord(
            f'{where}"{key}" is no valid Unicode: {half} at character {error.start + 1} is half of a surrogate pair'
        ) from None
    return text


def _weight(message: Mapping[str, Any], where: str) -> float | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise MalformedRecord(f'{where}"weight" is {weight!r}, not a number from 0 on')
    return float(weight)


def _value(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise MalformedRecord(f'{where}no key "{key}"; there {_listed(record)}')
    return record[key]


def _listed(record: Mapping[str, Any]) -> str:
    keys = [str(key) for key in record]
    shown = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")
    return f"are: {shown}" if keys else "is none"


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
