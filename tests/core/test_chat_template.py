"""Conversations as token ids: those of transformers and of the reference, and text that stays text."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tiny_tokenizers import CODE, train_huggingface, train_sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_core_impl.data.chat_template import ASSISTANT, PROMPTER, SYSTEM
from megatron_core_impl.data.conversation_encoder import ROLE, TEXT, WEIGHT, ConversationEncoder, ConversationRecipe
from megatron_core_impl.data.conversations import Message
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
IM = ("<|im_start|>", "<|im_end|>")

LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system_message if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}\n    {%- if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "You  add numbers.\n"},
    {"role": "user", "content": " def add(a, b)? "},
    {"role": "assistant", "content": "  return a + b 🙂 "},
    {"role": "user", "content": "for ö in range(10)"},
    {"role": "assistant", "content": "print(number)\n"},
]


def tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer of transformers with a chat template."""
    train_huggingface(folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    return folder


def encoder(folder: Path, **options: Any) -> ConversationEncoder:
    options = {"kind": "auto", "format": "messages", "template": "tokenizer", "added_tokens": IM} | options
    return ConversationRecipe(folder, **options).encoder()


def encoded(made: ConversationEncoder, *conversations: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and roles of each."""
    result = made.encode([{"messages": turns} for turns in conversations])
    assert not result.malformed, result.malformed
    borders = np.cumsum(result.sizes)[:-1]
    ids, roles = (np.split(result.streams[name], borders) for name in (TEXT, ROLE))
    return [(i.tolist(), r.tolist()) for i, r in zip(ids, roles, strict=True)]


def spelled(made: ConversationEncoder, folder: Path, turns: Sequence[Any]) -> list[tuple[int, str]]:
    """The conversation as stretches of one role."""
    ((ids, roles),) = encoded(made, turns)
    decode = load_tokenizer(folder, "auto", added_tokens=IM).decode
    starts = [i for i in range(len(ids)) if i == 0 or roles[i] != roles[i - 1]]
    return [(roles[a], decode(ids[a:b])) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def piece_length(tokens: Any, number: int) -> int:
    """Characters of a token, a space among them counted as one."""
    model = tokens.library
    return len(model.id_to_piece(number) if tokens.kind == "sentencepiece" else model.id_to_token(number))


def oracle(folder: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer in transformers, which gets the added tokens as part of the file."""
    other = shutil.copytree(folder, folder / "with-tokens")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(list(IM))
    made.save(str(other / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(other)


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


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | length }} turns", "takes '' for the answer|does not render the beginning"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", r"does not render the beginning.*generation"),
        ("{{ raise_exception('never') }}", "cannot be used for training: the chat template refuses it: never"),
        ("{% for m in messages %}{{ m.content }", "is no Jinja: line 1"),
        (
            "{% generation %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% endgeneration %}",
            r"takes 'What is seven\?</s>It is a number\.</s>' for the answer",
        ),
    ],
)
def test_a_template_of_no_use_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encoder(tokenizer(tmp_path, template))


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


def test_answers_that_change_as_the_conversation_goes_on_are_left_out(tmp_path: Path) -> None:
    """The end of an answer must be in the whole where it is without what follows."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' and loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    made = encoder(tokenizer(tmp_path, template))
    result = made.encode([{"messages": TURNS[1:3]}, {"messages": TURNS[1:]}])
    assert len(result.sizes) == 1
    ((index, reason),) = result.malformed
    assert index == 1
    assert reason.startswith("message 2: the chat template does not render the beginning of a conversation as the beginning of")


def test_weights_are_those_of_the_messages(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, None)
    turns = [turn | {"weight": weight} for turn, weight in zip(TURNS, (1, 0.25, 0, 0.25, 2), strict=True)]
    made = encoder(folder, template="chatml", has_weights=True)
    result = made.encode([{"messages": turns}])
    weights, roles = result.streams[WEIGHT], result.streams[ROLE]
    assert weights.dtype == made.dtypes[WEIGHT] == np.dtype("<f8")
    starts = [0, *(np.flatnonzero(np.diff(roles)) + 1)]
    assert weights[starts].tolist() == [1, 0.25, 0, 0.25, 2]
    llama = encoder(tokenizer(tmp_path / "llama", LLAMA), has_weights=True).encode([{"messages": turns}])
    assert "messages 1 to 2 have different weights, but the chat template does not tell where" in llama.malformed[0][1]


GENERATED_ALONE = CHATML.replace("{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (LLAMA, "</s>"),
        (CHATML, "<|im_end|>"),
        (GENERATED_ALONE, None),
        ("{% for m in messages %}{{ '<|im_start|>' + m.content + '\n' }}{% endfor %}", None),
        ("chatml", "<|im_end|>"),
        ("megatron-llm", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_end_of_an_answer(tmp_path: Path, template: str, end: str | None, kind: str) -> None:
    is_named = template in ("chatml", "megatron-llm")
    folder = tokenizer(tmp_path, None if is_named else template)
    if kind == "sentencepiece":
        train_sentencepiece(folder)
    made = encoder(folder, kind=kind, template=template if is_named else "tokenizer")
    tokens = load_tokenizer(folder, kind, added_tokens=IM)  # type: ignore[arg-type]
    assert made.end_of_answer == (None if end is None else {"</s>": tokens.eod_id, **tokens.added_tokens}[end])


@pytest.mark.parametrize("template", [LLAMA, CHATML], ids=["llama", "chatml"])
def test_an_example_is_the_text_and_the_ids_of_transformers(tmp_path: Path, template: str) -> None:
    folder = tokenizer(tmp_path, template)
    made, theirs = encoder(folder), oracle(folder)
    text, ids = made.example([Message(turn["role"], turn["content"]) for turn in TURNS])  # type: ignore[arg-type]
    assert text == theirs.apply_chat_template(TURNS, tokenize=False)
    assert ids == theirs(text, add_special_tokens=False).input_ids == encoded(made, TURNS)[0][0]


def test_an_example_of_the_reference(tmp_path: Path) -> None:
    made = encoder(tokenizer(tmp_path, None), template="megatron-llm")
    text, ids = made.example([Message("user", "a"), Message("assistant", f"b{SPELLING}")])
    assert text == f"<|im_start|>question\na<|im_end|>\n<|im_start|>answer\nb{SPELLING}<|im_end|>\n"
    assert ids == encoded(made, [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{SPELLING}"}])[0][0]


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
