"""Records of all formats to messages, and why some are none."""

from typing import Any

import pytest

from megatron_core_impl.data.conversations import Format, Message, keys_of, read_conversation
from megatron_core_impl.data.records import MalformedRecord

Q, A = Message("user", "Why?"), Message("assistant", "So.")
DIALOGUE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("format", "record", "messages"),
    [
        (
            "messages",
            {"messages": [
                {"role": "developer", "content": "Be short."}, {"role": "user", "content": "Why?", "weight": None},
                {"role": "assistant", "content": "Hm.", "weight": 0}, {"role": "tool", "content": "7", "name": "f"},
                {"role": "assistant", "content": "So.", "weight": 0.5},
            ], "id": 3},
            [Message("system", "Be short."), Q, Message("assistant", "Hm.", 0.0), Message("tool", "7"), A._replace(weight=0.5)],
        ),
        (
            "sharegpt",
            {"conversations": [
                {"from": "system", "value": ""}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."},
            ]},
            [Message("system", ""), Q, A],
        ),
        (
            "messages",
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?", "x": None}]},
                {"role": "assistant", "content": "So.", "tool_calls": None, "function_call": None},
            ], "tools": None, "system": "is no key of this format"},
            [Q, A],
        ),
        ("messages", {"messages": [*DIALOGUE[:1], DIALOGUE[1] | {"tool_calls": []}], "tools": []}, [Q, A]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be short."},
            [Message("system", "Be short."), Q, A],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "Be short."}, {"from": "gpt", "value": "So."}], "system": "",
             "tools": "[]"},
            [Message("system", "Be short."), A],
        ),
        (
            "sharegpt",
            {"conversations": [
                {"from": speaker, "value": "So."}
                for speaker in ("chatgpt", "bing", "bard", "model", "function", "observation", "tool")
            ]},
            [A] * 4 + [Message("tool", "So.")] * 3,
        ),
        ("alpaca", {"instruction": "Why?", "input": " \n", "output": "So."}, [Q, A]),
        ("alpaca", {"instruction": "Why?", "input": "1, 2", "output": "So."}, [Message("user", "Why?\n\n1, 2"), A]),
        ("alpaca", {"instruction": "Why?", "input": "", "output": "So."}, [Q, A]),
        ("alpaca", {"instruction": "Why?", "input": None, "output": "So."}, [Q, A]),
        ("alpaca", {"instruction": "Why?", "output": "So."}, [Q, A]),
        ("question-answer", {"question": "Why?", "answer": "So."}, [Q, A]),
        ("question-answer", {"system": None, "question": "Why?", "answer": "So."}, [Q, A]),
        ("question-answer", {"system": "", "question": "Why?", "answer": "So."}, [Message("system", ""), Q, A]),
    ],
)  # fmt: skip
def test_formats(format: Format, record: dict[str, Any], messages: list[Message]) -> None:
    assert read_conversation(record, format) == messages


def test_columns_rename_the_parts() -> None:
    record = {"p": "Why?", "r": "So.", "s": "Be short."}
    columns = {"question": "p", "answer": "r"}
    assert read_conversation(record, "question-answer", columns) == [Q, A]
    named = columns | {"system": "s"}
    assert read_conversation(record, "question-answer", named) == [Message("system", "Be short."), Q, A]
    assert keys_of("question-answer", columns) == (("p", "r", "system"), ("p", "r"))
    assert keys_of("question-answer", named) == (("p", "r", "s"), ("p", "r", "s"))
    assert keys_of("alpaca", {}) == (("instruction", "output", "input"), ("instruction", "output"))
    with pytest.raises(MalformedRecord, match='no key "s"; there are: p, r'):
        read_conversation({"p": "Why?", "r": "So."}, "question-answer", named)
    renamed = {"chat": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    assert read_conversation(renamed, "sharegpt", {"conversations": "chat"}) == [Q, A]
    with pytest.raises(
        ValueError, match=r"columns names 'prompt', which format alpaca does not have\. It has: instruction, output"
    ):
        keys_of("alpaca", {"prompt": "x"})


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "So."} | changes]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x", "id": 1}, 'no key "messages"; there are: text, id'),
        ({}, 'no key "messages"; there is none'),
        ({"messages": {"role": "user"}}, '"messages" is an object, not a list of messages'),
        ({"messages": None}, '"messages" is null, not a list of messages'),
        ({"messages": []}, "no message of the assistant, so nothing to learn"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant, so nothing to learn"),
        ({"messages": ["x"]}, "message 1: a string, not an object"),
        ({"messages": [{"content": "x"}]}, 'message 1: no key "role"; there are: content'),
        ({"messages": [{"role": "assistant"}]}, 'message 1: no key "content"; there are: role'),
        (turn(role="human"), "message 1: \"role\" is 'human'; known are system, developer, user, assistant, tool"),
        (turn(role=["user"]), "message 1: \"role\" is ['user']; known are system, developer, user, assistant, tool"),
        (turn(content=None), 'message 1: "content" is null, not a string'),
        (turn(content={"type": "text"}), 'message 1: "content" is an object, not a string'),
        (turn(content=[{"type": "text"}]), 'message 1: part 1 of "content": no key "text"; there are: type'),
        (turn(content=["So."]), 'message 1: part 1 of "content": a string, not an object'),
        (
            turn(content=[{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]),
            "message 1: part 2 of \"content\": its type is 'image_url'; only text can be learnt",
        ),
        (
            turn(content=None, tool_calls=[{"id": "1"}]),
            'message 1: "tool_calls" calls a tool, which is not taught here. Write the call into "content" instead',
        ),
        (
            turn(content="", function_call={"name": "f"}),
            'message 1: "function_call" calls a tool, which is not taught here. Write the call into "content" instead',
        ),
        (
            turn() | {"tools": [{"type": "function"}]},
            '"tools" describes tools, which are not taught here. Write them into a system message instead',
        ),
        (
            turn(content="a\ud800"),
            'message 1: "content" is no valid Unicode: \\ud800 at character 2 is half of a surrogate pair',
        ),
        (turn(weight=-1), 'message 1: "weight" is -1, not a number from 0 on'),
        (turn(weight=float("nan")), 'message 1: "weight" is nan, not a number from 0 on'),
        (turn(weight=True), 'message 1: "weight" is True, not a number from 0 on'),
    ],
)
def test_what_is_no_conversation(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRecord) as error:
        read_conversation(record, "messages")
    assert str(error.value) == reason


def test_a_record_has_one_system_message() -> None:
    chat = [{"from": "system", "value": "Be short."}, {"from": "gpt", "value": "So."}]
    with pytest.raises(MalformedRecord, match=r'^"rules" and a message of the system: which one counts\?$'):
        read_conversation({"conversations": chat, "rules": "Be long."}, "sharegpt", {"system": "rules"})
    with pytest.raises(MalformedRecord, match=r'^no key "rules"; there are: conversations$'):
        read_conversation({"conversations": chat}, "sharegpt", {"system": "rules"})
    assert keys_of("sharegpt", {})[0] == ("conversations", "system", "tools"), "read where files have columns, too"
    assert keys_of("messages", {}) == (("messages", "tools"), ("messages",))


def test_missing_parts_are_named_with_what_is_there() -> None:
    many = {f"k{i}": 0 for i in range(20)}
    with pytest.raises(MalformedRecord, match=r'no key "instruction"; there are: k0, .*, k7, …$'):
        read_conversation(many, "alpaca")
    with pytest.raises(MalformedRecord, match=r'^"answer" is a number, not a string$'):
        read_conversation({"question": "x", "answer": 3}, "question-answer")
