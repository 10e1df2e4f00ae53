"""A few documents with the ids they were given, by which the tokenizer of a published folder is proven to be the data's.

preprocess keeps the first documents of each set beside the data. verify, before anything is trained, and export, of the folder
that it publishes, let transformers encode them: who loads the model has transformers' tokenizer, which does not always give
what the tokenizer's own files say (of Llama's, spaces behind control tokens). Conversations are rendered by it, too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megatron_core_impl.data.conversation_encoder import ConversationRecipe
from megatron_core_impl.data.conversations import read_conversation
from megatron_core_impl.data.encoder import Encoder
from megatron_core_impl.data.preprocessing import Job
from megatron_core_impl.data.records import MalformedRecord, Record
from megatron_core_impl.data.text_encoder import TextRecipe, text_of
from megatron_core_impl.data.text_files import MIN_PART_BYTES, open_reader
from megatron_core_impl.data.tokenizer import Tokenizer

FILE = "examples.json"
OF_EACH_SET = 4
LONGEST = 4000  # characters: a text is cut there, a longer conversation is no example
SHOWN = 60  # characters, or ids, of an example that a message shows


class Example(TypedDict):
    """A document, or the beginning of one."""

    text: str
    ids: list[int]  # without what begins and ends a document
    messages: NotRequired[list[dict[str, str]]]  # of a conversation: what the text was rendered from


def write_examples(folder: Path, jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
    """Write the examples of the sets that jobs made.

    Documents that spell a control token are none: for us it is text, for transformers the token.
    """
    controls = list(tokenizer.control_tokens)
    found = [example for job in jobs for example in islice(_examples(job, controls), OF_EACH_SET)]
    (folder / FILE).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def read_examples(folder: Path) -> list[Example]:
    """The examples of a dataset."""
    examples: list[Example] = json.loads((folder / FILE).read_bytes())
    return examples


def difference(tokenizer: Any, examples: Sequence[Example]) -> str | None:
    """What a tokenizer of transformers does otherwise than the data, in one sentence; None where it does the same."""
    for example in examples:
        text = example["text"]
        if "messages" in example and "strftime_now" not in str(tokenizer.chat_template):  # there every day renders otherwise
            rendered = tokenizer.apply_chat_template(example["messages"], tokenize=False)
            if rendered != text:
                at = _first_difference(rendered, text)
                return f"it renders a conversation as {_around(rendered, at)}, the data have {_around(text, at)}"
        ids, expected = tokenizer(text, add_special_tokens=False).input_ids, example["ids"]
        if ids != expected:
            at = _first_difference(ids, expected)
            start = max(0, at - 2)
            return (
                f"of {_around(text, 0)} the ids from {start:,} on are {ids[start : at + 6]}, the data have "
                f"{expected[start : at + 6]}"
            )
    return None


def _examples(job: Job, controls: Sequence[str]) -> Iterator[Example]:
    recipe = job.recipe
    found = _of_text(job, recipe) if isinstance(recipe, TextRecipe) else _of_conversations(job)
    for said, example in found:
        if not any(token in said for token in controls):
            yield example


def _of_text(job: Job, recipe: TextRecipe) -> Iterator[tuple[str, Example]]:
    key = recipe.keys[0]
    encoder = replace(recipe, bos_eos="none", keys=(key,)).encoder()
    for record in _records(job, encoder):
        with suppress(MalformedRecord):
            if text := text_of(record, key)[:LONGEST]:
                yield text, Example(text=text, ids=encoder.encode([{key: text}]).streams[""].tolist())


def _of_conversations(job: Job) -> Iterator[tuple[str, Example]]:
    recipe = job.recipe
    assert isinstance(recipe, ConversationRecipe)
    encoder = recipe.encoder()
    for record in _records(job, encoder):
        with suppress(MalformedRecord):
            messages = read_conversation(record, recipe.format, dict(recipe.columns))
            text, ids = encoder.example(messages)
            if len(text) <= LONGEST and all(message.text for message in messages):  # we leave an empty system message out
                said = [{"role": message.role, "content": message.text} for message in messages]
                yield "".join(message.text for message in messages), Example(text=text, ids=ids, messages=said)


def _records(job: Job, encoder: Encoder) -> Iterator[Record]:
    """The records at the beginning of each file."""
    for file in job.files:
        with closing(open_reader(file, MIN_PART_BYTES, encoder.columns, encoder.required)) as reader:
            for rows in reader.blocks(0) or ():
                yield from (row for row in rows if isinstance(row, Mapping))


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _around(text: str, at: int) -> str:
    start = max(0, at - SHOWN // 3)
    return repr(text[start : start + SHOWN]) + ("…" if len(text) > start + SHOWN else "")
