"""Records of the formats in which conversations are passed around, as lists of messages.

| format | a record | roles |
|---|---|---|
| `messages` | `{"messages": [{"role", "content", "weight"?}, …]}`, as OpenAI | system (developer), user, assistant, tool |
| `sharegpt` | `{"conversations": [{"from", "value", "weight"?}, …]}` | system, human (user), gpt (assistant), tool |
| `alpaca` | `{"instruction", "input"?, "output"}` | the first two are the user's, an empty line between them |
| `question-answer` | `{"system"?, "question", "answer"}`, as in Megatron-LLM's guide | |

`columns` names the keys of a record where they differ: `{"question": "prompt"}`. A `system` key named there must be in every
record. A message's `weight` is what its tokens count in the loss beside the weight of its role; without one it is 1.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from megatron_core_impl.data.records import MalformedRecord, Record

Format = Literal["messages", "sharegpt", "alpaca", "question-answer"]
Role = Literal["system", "user", "assistant", "tool"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "question-answer": ("question", "answer"),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": (), "sharegpt": (), "alpaca": ("input",), "question-answer": ("system",),
}  # fmt: skip
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool",
}  # fmt: skip


class Message(NamedTuple):
    """What one side says."""

    role: Role
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
            messages = _read_list(record, columns.get("messages", "messages"), "role", "content", ROLES)
        case "sharegpt":
            messages = _read_list(record, columns.get("conversations", "conversations"), "from", "value", SHAREGPT_ROLES)
        case "alpaca":
            question = _text(record, columns.get("instruction", "instruction"))
            context = columns.get("input", "input")
            if record.get(context) not in (None, ""):
                question += f"\n\n{_text(record, context)}"
            messages = [Message("user", question), Message("assistant", _text(record, columns.get("output", "output")))]
        case "question-answer":
            messages = [
                Message("user", _text(record, columns.get("question", "question"))),
                Message("assistant", _text(record, columns.get("answer", "answer"))),
            ]
            system = columns.get("system", "system")
            if "system" in columns or record.get(system) is not None:
                messages.insert(0, Message("system", _text(record, system)))
    if not any(message.role == "assistant" for message in messages):
        raise MalformedRecord("no message of the assistant, so nothing to learn")
    return messages


def _read_list(record: Record, key: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> list[Message]:
    found = _value(record, key, "")
    if not isinstance(found, list | tuple):
        raise MalformedRecord(f'"{key}" is {_kind(found)}, not a list of messages')
    messages = []
    for number, message in enumerate(found, 1):
        where = f"message {number}: "
        if not isinstance(message, Mapping):
            raise MalformedRecord(f"{where}{_kind(message)}, not an object")
        role = _value(message, role_key, where)
        if not isinstance(role, str) or role not in roles:
            raise MalformedRecord(f'{where}"{role_key}" is {role!r}; known are {", ".join(roles)}')
        messages.append(Message(roles[role], _text(message, text_key, where), _weight(message, where)))
    return messages


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
