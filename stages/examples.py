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

from megatron_core_impl.data.conversation_encoder import ConversationEncoder, ConversationRecipe
from megatron_core_impl.data.conversations import Message, read_conversation
from megatron_core_impl.data.encoder import Encoder, Recipe
from megatron_core_impl.data.preprocessing import Job
from megatron_core_impl.data.records import MalformedRecord, Record
from megatron_core_impl.data.text_encoder import TextEncoder, TextRecipe, text_of
from megatron_core_impl.data.text_files import MIN_PART_BYTES, open_reader
from megatron_core_impl.data.tokenizer import Tokenizer

FILE = "examples.json"
OF_EACH_SET = 4
TRIED = 200  # records of each set
LONGEST = 4000  # characters: a text is cut there, a longer conversation is no example
SAMPLE = "def f(x):\n    return x + 12345  # twice?\n"  # an example of every dataset, also where no document is one
SHOWN = 60  # characters, or ids, of an example that a message shows


class Example(TypedDict):
    """A document, or the beginning of one."""

    text: str
    ids: list[int]  # without what begins and ends a document
    messages: NotRequired[list[dict[str, str]]]  # of a conversation: what the text was rendered from


def write_examples(folder: Path, recipe: Recipe, jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
    """Write the examples of the sets that jobs made; before them one of our own, made by `recipe`.

    Documents that spell a control token are none: for us it is text, for transformers the token. White space that a text begins
    with is left out: transformers' tokenizer of Llama models takes it for the mark of its first word.
    """
    controls = list(tokenizer.control_tokens)
    found = [_sample(recipe)]
    for job in jobs:
        found += islice(_examples(job, controls), OF_EACH_SET)
    (folder / FILE).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def read_examples(folder: Path) -> list[Example]:
    """The examples of a dataset."""
    examples: list[Example] = json.loads((folder / FILE).read_bytes())
    return examples


def difference(tokenizer: Any, examples: Sequence[Example]) -> str | None:
    """What a tokenizer of transformers does otherwise than the data, in one sentence; None where it does the same."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = {*tokenizer.all_special_tokens, *added}
    for example in examples:
        text = example["text"]
        said = [message["content"] for message in example["messages"]] if "messages" in example else [text]
        if any(token in part for token in special for part in said):
            continue  # spelled: text in the data, the token for transformers
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


def _sample(recipe: Recipe) -> Example:
    """Our own example."""
    if isinstance(recipe, TextRecipe):
        return _of_text(replace(recipe, bos_eos="none").encoder(), recipe.keys[0], SAMPLE)
    assert isinstance(recipe, ConversationRecipe)
    return _of_messages(recipe.encoder(), [Message("user", SAMPLE), Message("assistant", SAMPLE)])


def _examples(job: Job, controls: Sequence[str]) -> Iterator[Example]:
    recipe = job.recipe
    assert isinstance(recipe, TextRecipe | ConversationRecipe)
    text_encoder = replace(recipe, bos_eos="none").encoder() if isinstance(recipe, TextRecipe) else None
    encoder = text_encoder or recipe.encoder()
    for record in islice(_records(job, encoder), TRIED):
        with suppress(MalformedRecord):
            if isinstance(encoder, ConversationEncoder):
                assert isinstance(recipe, ConversationRecipe)
                messages = read_conversation(record, recipe.format, dict(recipe.columns))
                said = [message.text for message in messages]
                # An empty system message is left out of our text.
                if all(said) and sum(map(len, said)) <= LONGEST and not _spells(said, controls):
                    yield _of_messages(encoder, messages)
            else:
                assert isinstance(recipe, TextRecipe)
                assert text_encoder is not None
                text = text_of(record, recipe.keys[0]).lstrip()[:LONGEST]
                if text and not _spells([text], controls):
                    yield _of_text(text_encoder, recipe.keys[0], text)


def _spells(said: Sequence[str], controls: Sequence[str]) -> bool:
    return any(token in part for token in controls for part in said)


def _of_text(encoder: TextEncoder, key: str, text: str) -> Example:
    return Example(text=text, ids=encoder.encode([{key: text}]).streams[""].tolist())


def _of_messages(encoder: ConversationEncoder, messages: Sequence[Message]) -> Example:
    text, ids = encoder.example(messages)
    return Example(text=text, ids=ids, messages=[{"role": message.role, "content": message.text} for message in messages])


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
