"""Records of all formats to messages, and why some are none."""

from typing import Any

import pytest

from megatron_core_impl.data.conversations import Format, Message, keys_of, read_conversation
from megatron_core_impl.data.records import MalformedRecord

Q, A = Message("user", "Why?"), Message("assistant", "So.")


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
        (turn(content=[{"type": "text"}]), 'message 1: "content" is a list, not a string'),
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


def test_missing_parts_are_named_with_what_is_there() -> None:
    many = {f"k{i}": 0 for i in range(20)}
    with pytest.raises(MalformedRecord, match=r'no key "instruction"; there are: k0, .*, k7, …$'):
        read_conversation(many, "alpaca")
    with pytest.raises(MalformedRecord, match=r'^"answer" is a number, not a string$'):
        read_conversation({"question": "x", "answer": 3}, "question-answer")
