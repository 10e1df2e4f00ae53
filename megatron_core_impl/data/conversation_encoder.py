"""Conversations to token streams: what is said, who says it, and what it counts.

| stream | of every token | type |
|---|---|---|
| `-text` | its id | uint16, or int32 from 65500 ids on |
| `-role` | whose it is: 0 system, 1 prompter, 2 assistant | the same |
| `-weight` | the weight of its message | float64; only where the records have weights |

Text and role streams are those of Megatron-LLM's `preprocess_instruct_data.py`, which also leaves doc_idx at [0].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_core_impl.data.chat_template import (
    ReferenceTemplate,
    Region,
    TemplateName,
    end_of_answer,
    load_template,
)
from megatron_core_impl.data.control_tokens import EncodedText, text_encoder
from megatron_core_impl.data.conversations import Format, Message, keys_of, read_conversation
from megatron_core_impl.data.encoder import Encoded
from megatron_core_impl.data.indexed_dataset import dtype_for
from megatron_core_impl.data.marks import Marks
from megatron_core_impl.data.records import MalformedRecord, Record
from megatron_core_impl.data.streams import ROLE, TEXT, WEIGHT, bin_path, idx_path
from megatron_core_impl.data.tokenizer import Kind, load_tokenizer


@dataclass(frozen=True)
class ConversationRecipe:
    """How conversations become tokens. `repr` names all that decides the result but the tokenizer's files.

    Attributes:
        tokenizer: folder.
        columns: keys of a record that differ from the format's own, by part (see `conversations`).
        added_tokens: special tokens that the tokenizer gets, as `load_tokenizer` takes them.
        has_weights: write the stream of weights. Without it a record with a weight other than 1 is malformed.
        parse_special: special tokens spelled in a message become control tokens, as in Megatron-LLM.
    """

    tokenizer: Path
    kind: Kind | Literal["auto"]
    format: Format
    template: TemplateName
    columns: tuple[tuple[str, str], ...] = ()
    added_tokens: tuple[str, ...] = ()
    has_weights: bool = False
    parse_special: bool = False

    def encoder(self) -> "ConversationEncoder":
        """Make the encoder.

        Raises:
            ValueError: the tokenizer or its chat template is of no use; the message says what to change.
        """
        return ConversationEncoder(self)


class Example(NamedTuple):
    """A conversation as text, which is what transformers' `apply_chat_template(tokenize=False)` gives, and as ids."""

    text: str
    ids: list[int]


class ConversationEncoder:
    """Makes streams of records; see `encoder.Encoder`.

    Attributes:
        header_tokens: how many tokens at the beginning of every answer are marked as it but are not (`instruction_dataset`).
        end_of_answer: id of the control token that the template writes last for an answer, such as `<|im_end|>` or `</s>`;
            None where it writes none.
    """

    ends_documents = False  # as in the reference

    def __init__(self, recipe: ConversationRecipe) -> None:
        self._recipe = recipe
        self._columns: Mapping[str, str] = dict(recipe.columns)
        self.columns, self.required = keys_of(recipe.format, self._columns)
        tokenizer = load_tokenizer(recipe.tokenizer, recipe.kind, added_tokens=recipe.added_tokens)
        controls = tokenizer.control_tokens
        self._marks = Marks(list(controls), parse_special=recipe.parse_special)
        self._template = load_template(recipe.template, recipe.tokenizer, self._marks, tokenizer)
        self._encoder = text_encoder(tokenizer)
        ids = dtype_for(tokenizer.vocab_size)
        self.dtypes: dict[str, np.dtype[Any]] = {TEXT: ids, ROLE: ids}
        if recipe.has_weights:
            self.dtypes[WEIGHT] = np.dtype("<f8")
        headers = [[self._template.header]] if isinstance(self._template, ReferenceTemplate) else []
        self.header_tokens = sum(len(header.ids) for header in self._encoder.encode(headers))
        end = end_of_answer(self._template)
        self.end_of_answer = None if end is None else list(controls.values())[end]

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Encode a chunk."""
        texts: list[list[Region]] = []
        counts: list[int] = []  # texts of each document
        malformed: list[tuple[int, str]] = []
        for index, record in enumerate(records):
            try:
                rendered = self._template.render(read_conversation(record, self._recipe.format, self._columns))
                self._check_weights(rendered)
            except MalformedRecord as error:
                malformed.append((index, str(error)))
                continue
            texts += rendered
            counts.append(len(rendered))
        return self._streams(texts, self._encoder.encode(texts), counts, malformed)

    def example(self, messages: Sequence[Message]) -> Example:
        """One conversation as `encode` would have it, with its text.

        An empty system message is left out of the text too. Where a message spells a control token, only ids tell that it is
        text.

        Raises:
            MalformedRecord: the template cannot express it.
        """
        texts = self._template.render(messages)
        text = "".join(region.text for regions in texts for region in regions)
        return Example(self._marks.spell(text), [int(i) for encoded in self._encoder.encode(texts) for i in encoded.ids])

    def _check_weights(self, rendered: Sequence[Sequence[Region]]) -> None:
        if self._recipe.has_weights:
            return
        if others := [region.weight for regions in rendered for region in regions if region.weight != 1]:
            raise MalformedRecord(f"a message has weight {others[0]:g}, but weights are not asked for")

    def _streams(
        self, texts: Sequence[Sequence[Region]], encoded: Sequence[EncodedText], counts: Sequence[int],
        malformed: list[tuple[int, str]],
    ) -> Encoded:  # fmt: skip
        """Streams of documents from those of their texts."""
        regions = [region for text in texts for region in text]
        tokens_of_region = np.array([size for text in encoded for size in text.sizes], np.int64)
        tokens_of_text = np.array([len(text.ids) for text in encoded], np.int64)
        ends = np.cumsum(counts, dtype=np.int64)
        sizes = np.add.reduceat(tokens_of_text, ends - counts) if counts else np.empty(0, np.int64)
        ids = np.concatenate([np.empty(0, np.int64), *(text.ids for text in encoded)])
        if len(ids) and ids.max() > np.iinfo(self.dtypes[TEXT]).max:
            raise ValueError(f"token id {ids.max():,} does not fit {self.dtypes[TEXT].name}")
        streams = {
            TEXT: ids.astype(self.dtypes[TEXT]),
            ROLE: np.repeat(np.array([region.role for region in regions], self.dtypes[ROLE]), tokens_of_region),
        }
        if self._recipe.has_weights:
            streams[WEIGHT] = np.repeat(np.array([region.weight for region in regions], "<f8"), tokens_of_region)
        return Encoded(streams, sizes, malformed=malformed)


def drop_plain_weights(prefix: Path) -> None:
    """Remove a set's stream of weights where there is one and all of it is 1: a set without one means the same."""
    file = bin_path(f"{prefix}{WEIGHT}")
    if not file.is_file():
        return
    with file.open("rb") as weights:
        while block := weights.read(1 << 20):
            if (np.frombuffer(block, "<f8") != 1).any():
                return
    file.unlink()
    idx_path(f"{prefix}{WEIGHT}").unlink()
