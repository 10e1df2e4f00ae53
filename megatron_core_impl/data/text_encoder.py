"""Records of plain text to documents: the tokens of each key that holds text, with what begins and ends a document."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_core_impl.data.encoder import Encoded
from megatron_core_impl.data.indexed_dataset import Tokens, dtype_for
from megatron_core_impl.data.records import MalformedRecord, Record
from megatron_core_impl.data.tokenizer import Kind, load_tokenizer

BosEos = Literal["none", "eos", "both"]  # nothing; EOS after each document (the reference's --append_eod); BOS before it too


@dataclass(frozen=True)
class TextRecipe:
    """How to tokenize text."""

    tokenizer: Path  # folder
    kind: Kind | Literal["auto"] = "auto"
    keys: tuple[str, ...] = ("text",)  # of a record; the text of each is a document, in this order
    bos_eos: BosEos = "eos"
    parse_special: bool = False  # see load_tokenizer
    added_tokens: tuple[str, ...] = ()

    def encoder(self) -> "TextEncoder":
        """Make the encoder.

        Raises:
            ValueError: no tokenizer, or one without a token that `bos_eos` asks for.
        """
        return TextEncoder(self)


class TextEncoder:
    """Makes one stream of tokens. Records whose text has no tokens are left out, as by the reference."""

    ends_documents = True

    def __init__(self, recipe: TextRecipe) -> None:
        tokenizer = load_tokenizer(
            recipe.tokenizer, recipe.kind, parse_special=recipe.parse_special, added_tokens=recipe.added_tokens
        )
        self._tokenizer = tokenizer
        self._bos = _needed(tokenizer.bos_id, "bos") if recipe.bos_eos == "both" else None
        self._eos = _needed(tokenizer.eod_id, "eos") if recipe.bos_eos != "none" else None
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._keys = recipe.keys
        self.dtypes: dict[str, np.dtype[Any]] = {"": self._dtype}
        self.columns = self.required = recipe.keys

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Encode a chunk of records."""
        texts: list[str] = []
        malformed: list[tuple[int, str]] = []
        for number, record in enumerate(records):
            try:
                texts += [text_of(record, key) for key in self._keys]
            except MalformedRecord as error:
                malformed.append((number, str(error)))
        tokens, sizes = self._tokenizer.encode_flat(texts)
        is_empty = sizes == 0
        documents, sizes = self._bounded(tokens, sizes[~is_empty])
        return Encoded({"": documents}, sizes, int(is_empty.sum()), malformed, Counter())

    def _bounded(self, tokens: Tokens, sizes: npt.NDArray[np.int64]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Documents with BOS and EOS around them, in the type they are stored in, and their sizes."""
        before, after = int(self._bos is not None), int(self._eos is not None)
        if not before and not after:
            return tokens.astype(self._dtype, copy=False), sizes
        longer = sizes + before + after
        ends = np.cumsum(longer)
        is_text = np.ones(int(longer.sum()), np.bool_)
        bounded = np.empty(len(is_text), self._dtype)
        for token, places in ((self._bos, ends - longer), (self._eos, ends - 1)):
            if token is not None:
                bounded[places] = token
                is_text[places] = False
        bounded[is_text] = tokens
        return bounded, longer


def text_of(record: Record, key: str) -> str:
    """The text of a record.

    Raises:
        MalformedRecord: it has none, or one that is no valid Unicode.
    """
    if key not in record:
        raise MalformedRecord(f'no key "{key}"; it has: {", ".join(map(str, record)) or "none"}')
    text = record[key]
    if not isinstance(text, str):
        raise MalformedRecord(f'"{key}" is {name_of(text)}, not a string')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise MalformedRecord(
                f'"{key}" is no valid Unicode: {half} at character {error.start + 1} is half of a surrogate pair'
            ) from None
    return text


def name_of(value: Any) -> str:
    """What JSON calls a value, or, where it has none such, Python."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "true or false", bytes: "binary"}
    is_number = isinstance(value, int | float)
    return "null" if value is None else names.get(type(value), "a number" if is_number else f"a {type(value).__name__}")


def _needed(token: int | None, name: str) -> int:
    if token is None:
        raise ValueError(f"the tokenizer names no {name} token, which bos_eos asks for")
    return token
