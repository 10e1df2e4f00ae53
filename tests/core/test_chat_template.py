"""Conversations as token ids: those of transformers and of the reference, and text that stays text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import (
    CHATML,
    IM,
    LLAMA,
    TURNS,
    encoded,
    encoder,
    oracle,
    spelled,
    tokenizer,
)
from tiny_tokenizers import CODE, train_sentencepiece

from megatron_core_impl.data.chat_template import ASSISTANT, PROMPTER, SYSTEM
from megatron_core_impl.data.conversation_encoder import ROLE, TEXT
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"


def piece_length(tokens: Any, number: int) -> int:
    """Characters of a token, a space among them counted as one."""
    model = tokens.library
    return len(model.id_to_piece(number) if tokens.kind == "sentencepiece" else model.id_to_token(number))


@pytest.mark.parametrize("template", [LLAMA, CHATML], ids=["llama", "chatml"])
@pytest.mark.parametrize("in_file", [False, True])
def test_ids_are_those_of_transformers(tmp_path: Path, template: str, in_file: bool) -> None:
    folder = tokenizer(tmp_path, "{{ 1 }}" if in_file else template)
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    made, theirs = encoder(folder), oracle(folder)
    conversations = [TURNS, TURNS[1:], TURNS[:3], [{"role": "user", "content": text} for text in CODE[:1]] + TURNS[2:3]]
    for turns, (ids, roles) in zip(conversations, encoded(made, *conversations), strict=True):
        want = theirs.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == want["input_ids"]
        assert ids.count(0) == ids[:1].count(0) + (template == LLAMA and len(turns) > 3), "one BOS, where the template has it"
        if template == CHATML:
            assert [int(role == ASSISTANT) for role in roles] == want["assistant_masks"]


def test_whose_a_token_is_follows_from_rendering_the_beginning(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, LLAMA)
    assert spelled(encoder(folder), folder, TURNS) == [
        (PROMPTER, "<s>[INST] <<SYS>>\nYou  add numbers.\n\n<</SYS>>\n\ndef add(a, b)? [/INST]"),
        (ASSISTANT, " return a + b 🙂 </s>"),
        (PROMPTER, "<s>[INST] for ö in range(10) [/INST]"),
        (ASSISTANT, " print(number) </s>"),
    ]


def test_chatml(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, None)
    assert spelled(encoder(folder, template="chatml"), folder, [*TURNS[:3], {"role": "tool", "content": "7"}]) == [
        (SYSTEM, "<|im_start|>system\nYou  add numbers.\n<|im_end|>\n"),
        (PROMPTER, "<|im_start|>user\n def add(a, b)? <|im_end|>\n<|im_start|>assistant\n"),
        (ASSISTANT, "  return a + b 🙂 <|im_end|>\n"),
        (PROMPTER, "<|im_start|>tool\n7<|im_end|>\n"),
    ]
    assert encoder(folder, template="chatml").header_tokens == 0


SPELLING = "a</s>b<|im_end|> <|im_start|><s>"


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
@pytest.mark.parametrize("template", ["chatml", "megatron-llm", "tokenizer"])
def test_text_that_spells_a_control_token_is_text(tmp_path: Path, kind: str, template: str) -> None:
    folder = tokenizer(tmp_path, LLAMA)
    if kind == "sentencepiece":
        train_sentencepiece(folder)
    tokens = load_tokenizer(folder, kind, added_tokens=IM)  # type: ignore[arg-type]
    controls = {tokens.bos_id, tokens.eod_id, tokens.vocab_size - 1, tokens.vocab_size - 2}
    plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    hostile = [{"role": "user", "content": f"x{SPELLING}"}, {"role": "assistant", "content": f"{SPELLING}y"}]
    made = encoder(folder, kind=kind, template=template)
    (ids, _), (hostile_ids, roles) = encoded(made, plain, hostile)
    assert [i for i in hostile_ids if i in controls] == [i for i in ids if i in controls]
    text = load_tokenizer(folder, kind).decode([i for i in hostile_ids if i not in controls])  # type: ignore[arg-type]
    assert text.count(SPELLING) == 2
    assert ASSISTANT in roles
    reference = encoder(folder, kind=kind, template=template, parse_special=True)
    ((parsed, _),) = encoded(reference, hostile)
    assert len([i for i in parsed if i in controls]) == len([i for i in ids if i in controls]) + 8


def test_spelled_tokens_are_encoded_in_their_context(tmp_path: Path) -> None:
    """Not cut apart at the spelling: the ids are those of the whole text without any special token known."""
    folder = tokenizer(tmp_path, None)
    text = f"print{SPELLING}(number)"
    ((ids, _),) = encoded(encoder(folder, template="chatml"), [{"role": "assistant", "content": text}])
    whole = load_tokenizer(folder, added_tokens=IM).encode(f"assistant\n{text}")
    assert ids[1 : 1 + len(whole)] == whole


def test_sentencepiece_begins_anew_after_a_control_token(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, LLAMA)
    train_sentencepiece(folder)
    made, tokens = encoder(folder, kind="sentencepiece"), load_tokenizer(folder, "sentencepiece")
    ((ids, roles),) = encoded(made, TURNS[1:3])
    assert ids == [1, *tokens.encode("[INST] def add(a, b)? [/INST] return a + b 🙂 "), 2]
    answer = [i for i, role in zip(ids, roles, strict=True) if role == ASSISTANT]
    assert tokens.decode(answer).strip() == "return a + b 🙂", (
        "cut within a text, before the first byte of it and after the last"
    )
    for emoji in ("🙂", "ö"):  # pieces of several bytes at both borders
        ((ids, roles),) = encoded(
            encoder(folder, kind="sentencepiece", template="chatml"),
            [{"role": "user", "content": emoji}, {"role": "assistant", "content": emoji}],
        )
        answer = [i for i, role in zip(ids, roles, strict=True) if role == ASSISTANT]
        end = tokens.encode("\n")
        assert answer == [
            *tokens.encode(f"assistant\n{emoji}")[len(tokens.encode("assistant\n")) :],
            tokens.vocab_size + 1,
            *end,
        ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, None)
    with pytest.raises(ValueError, match=r'no chat template .*Set preprocess\.chat_template to "chatml"'):
        encoder(folder)
    with pytest.raises(ValueError, match=r'needs the special token <\|im_end\|>.*Set model\.added_tokens: \["<\|im_start\|>"'):
        encoder(folder, template="chatml", added_tokens=())


def test_tokens_that_are_not_special_become_it_by_name(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, CHATML)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["added_tokens"][-1]["special"] = False  # <|im_start|>
    file.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"has, but not as special: any text that spells it becomes it\. Set.*keeps its id"):
        encoder(folder, template="chatml", added_tokens=IM[1:])
    number = definition["added_tokens"][-1]["id"]
    for template in ("chatml", "tokenizer"):
        hostile = [{"role": "user", "content": SPELLING}, {"role": "assistant", "content": f"{SPELLING}\ny"}]
        ((ids, _),) = encoded(encoder(folder, template=template), hostile)
        assert ids.count(number) == 2, "those of the template"


def test_malformed_conversations_are_left_out(tmp_path: Path) -> None:
    made = encoder(tokenizer(tmp_path, LLAMA))
    records = [
        {"messages": TURNS[2:]},
        {"messages": TURNS[:2]},
        {"messages": TURNS},
        {"messages": [TURNS[1], {"role": "assistant", "content": "\U0010ffff"}]},
        {"messages": [TURNS[1], {"role": "assistant", "content": "x", "weight": 0}]},
    ]
    result = made.encode(records)
    assert [(i, text.split(":")[-1].strip()) for i, text in result.malformed] == [
        (0, "roles must alternate"),
        (1, "no message of the assistant, so nothing to learn"),
        (3, "a text holds U+10FFFE or U+10FFFF, which are no characters"),
        (4, "a message has weight 0, but weights are not asked for"),
    ]
    assert len(result.sizes) == 1
    assert not made.encode([]).malformed
    assert len(made.encode(records[:1]).streams[TEXT]) == 0


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_a_token_across_a_border_is_the_answers(tmp_path: Path, kind: str) -> None:
    folder = tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    if kind == "sentencepiece":
        train_sentencepiece(folder)
    tokens, text = load_tokenizer(folder, kind), "def print(number) return self.number"  # type: ignore[arg-type]
    ids = tokens.encode(text)
    dummy = int(kind == "sentencepiece")  # the mark of a word before the text
    ends = (np.cumsum([piece_length(tokens, i) for i in ids]) - dummy).tolist()
    long = [k for k in range(1, len(ids)) if ends[k] - ends[k - 1] > 1]
    first, last = long[0], long[-1]
    assert first < last
    parts = text[: ends[first - 1] + 1], text[ends[first - 1] + 1 : ends[last] - 1], text[ends[last] - 1 :]
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
    ((got, whose),) = encoded(encoder(folder, kind=kind), turns)
    assert got == ids
    assert [k for k, role in enumerate(whose) if role == ASSISTANT] == list(range(first, last + 1))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's files are not here")
@pytest.mark.parametrize("name", ["instruct", "instruct_system"])
def test_the_files_of_the_reference(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer" / "llama2.model").read_bytes())
    records = [json.loads(line) for line in (GOLDEN / "instruct" / "instruct.jsonl").open()]
    columns = {"answer": "response"} | ({"system": "system_prompt"} if "system" in name else {})
    made = encoder(
        tmp_path, format="question-answer", template="megatron-llm", columns=tuple(columns.items()), parse_special=True
    )
    result = made.encode(records)
    for suffix in (TEXT, ROLE):
        theirs = IndexedDataset(GOLDEN / "instruct" / f"{name}{suffix}")
        assert made.dtypes[suffix] == theirs.dtype
        assert result.streams[suffix].tobytes() == (GOLDEN / "instruct" / f"{name}{suffix}.bin").read_bytes()
        assert np.array_equal(result.sizes, theirs.sizes)
    assert made.header_tokens == 3
    assert not made.ends_documents
