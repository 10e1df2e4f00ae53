"""Templates in Jinja: which are taken, whose text is whose and counts what, and what ends an answer."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_templates import (
    CHATML,
    GEMMA,
    IM,
    LLAMA,
    LLAMA_3,
    MISTRAL,
    PHI_3,
    QWEN_3,
    TURNS,
    encoded,
    encoder,
    oracle,
    spelled,
    tokenizer,
)
from tiny_tokenizers import train_sentencepiece

from megatron_core_impl.data.chat_template import ASSISTANT, PROMPTER
from megatron_core_impl.data.conversation_encoder import ROLE, TEXT, WEIGHT
from megatron_core_impl.data.conversations import Message
from megatron_core_impl.data.tokenizer import load_tokenizer


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


@pytest.mark.parametrize(
    "template", [MISTRAL, LLAMA_3, GEMMA, QWEN_3, PHI_3], ids=["mistral", "llama3", "gemma", "qwen3", "phi3"]
)
def test_templates_of_the_field_are_taken(tmp_path: Path, template: str) -> None:
    folder = tokenizer(tmp_path, template)
    made, theirs = encoder(folder), oracle(folder)
    ((ids, roles),) = encoded(made, TURNS[1:3])
    assert ids == theirs.apply_chat_template(TURNS[1:3], return_dict=True)["input_ids"]
    learnt = theirs.decode([i for i, role in zip(ids, roles, strict=True) if role == ASSISTANT])
    assert learnt.endswith(("</s>", "<|im_end|>", "<|im_end|>\n"))


@pytest.mark.parametrize(
    ("template", "header"),
    [(LLAMA_3, "<|im_start|>assistant"), (GEMMA, "<|im_start|>model"), (PHI_3, "<|assistant|>")],
    ids=["llama3", "gemma", "phi3"],
)
def test_a_template_that_always_prompts_is_refused(tmp_path: Path, template: str, header: str) -> None:
    """It would teach to begin another answer behind the end of each."""
    always = template.replace("{% if add_generation_prompt %}", "{% if true %}")
    with pytest.raises(
        ValueError, match=rf"header of a further answer, '<\|im_end\|>.*{re.escape(header)}', which a model would"
    ):
        encoder(tokenizer(tmp_path, always))


def test_text_of_the_system_within_the_question_is_the_users(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, MISTRAL)
    assert spelled(encoder(folder), folder, TURNS[:3]) == [
        (PROMPTER, "<s>[INST] You  add numbers.\n\n\n def add(a, b)?  [/INST]"),
        (ASSISTANT, "   return a + b 🙂 </s>"),
    ]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("m.content.index('?')", "ValueError: substring not found"),
        ("7 // (m.content | length - 1)", "ZeroDivisionError: .*zero"),
        ("m.name.first", "UndefinedError: .*has no attribute 'name'"),
        ("m.content + 7", "TypeError: .*str"),
    ],
)
def test_a_template_that_fails_at_a_record_does_so_at_that_record_only(tmp_path: Path, expression: str, reason: str) -> None:
    failing = f"{{% for m in messages %}}{{% if 'x' in m.content %}}{{{{ {expression} }}}}{{% endif %}}{{% endfor %}}"
    made = encoder(tokenizer(tmp_path, failing + LLAMA))
    turns = [{"role": "user", "content": "x"}, TURNS[2]]
    result = made.encode([{"messages": turns}, {"messages": TURNS}])
    assert len(result.sizes) == 1
    ((index, found),) = result.malformed
    assert index == 0
    assert re.match(f"the chat template fails: {reason}", found)


@pytest.mark.parametrize(
    ("today", "day"),
    [
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b') }}{% else %}27 Jul{% endif %}", "27 Jul"),
        ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"),
    ],
)
def test_a_template_is_never_told_todays_date(tmp_path: Path, today: str, day: str) -> None:
    text, _ = encoder(tokenizer(tmp_path, today + LLAMA_3)).example([Message("user", "a"), Message("assistant", "b")])
    assert text.startswith(f"{day}<s><|im_start|>user")


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
    spelt = "b</s><|im_end|>"
    made = encoder(tokenizer(tmp_path, None), template="megatron-llm")
    text, ids = made.example([Message("user", "a"), Message("assistant", spelt)])
    assert text == f"<|im_start|>question\na<|im_end|>\n<|im_start|>answer\n{spelt}<|im_end|>\n"
    assert ids == encoded(made, [{"role": "user", "content": "a"}, {"role": "assistant", "content": spelt}])[0][0]


@pytest.mark.parametrize("template", ["chatml", LLAMA_3, CHATML], ids=["chatml", "llama3", "generation"])
def test_weights_that_differ_between_two_answers(tmp_path: Path, template: str) -> None:
    """The border of messages is where the beginning of the conversation ends that is rendered up to there."""
    turns = [
        ("system", "s", 1),
        ("user", "a", 0.5),
        ("tool", "b", 0.25),
        ("assistant", "c", 2),
        ("tool", "d", 0),
        ("user", "e", 3),
    ]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    folder = tokenizer(tmp_path, None if template == "chatml" else template)
    made = encoder(folder, template="chatml" if template == "chatml" else "tokenizer", has_weights=True)
    result = made.encode([{"messages": messages}])
    assert not result.malformed
    tokens = load_tokenizer(folder, added_tokens=IM)
    ids, weights = result.streams[TEXT].tolist(), result.streams[WEIGHT].tolist()
    starts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    got = [(weights[a], tokens.decode(ids[a:b]).split("<|im_start|>")[1:]) for a, b in pairwise(starts)]
    end = "<|im_end|>" + ("" if template == LLAMA_3 else "\n")
    head = "\n\n" if template == LLAMA_3 else "\n"
    header = f"assistant{head}"
    said = [(weight, f"{role}{head}{text}{end}") for role, text, weight in turns]
    assert [weight for weight, _ in got] == [weight for _, _, weight in turns]
    assert got[0][1] == [said[0][1]]
    assert got[1][1] == [said[1][1]]
    assert got[2][1] == [said[2][1], header], "the prompt for an answer counts as the message before it"
    assert got[-1][1] == [said[-1][1]]


def test_weights_that_differ_where_no_border_is_known(tmp_path: Path) -> None:
    turns = [turn | {"weight": weight} for turn, weight in zip(TURNS, (0, 1, 1, 1, 1), strict=True)]
    made = encoder(tokenizer(tmp_path, MISTRAL), has_weights=True)
    ((_, reason),) = made.encode([{"messages": [{"role": "system", "content": ""}, *turns]}]).malformed
    assert reason == (
        "messages 2 to 3 have different weights, but the chat template does not tell where one ends and the next begins"
    )
