"""What the normalizer of a tokenizer of Hugging Face makes of a text: by Python where that is surely the same, else by the
library, which is slower for text of ASCII."""

import re
from collections.abc import Callable
from typing import Any

from tokenizers.normalizers import Normalizer

REMOVED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # by BERT's, as controls
SPACES = str.maketrans("\t\n\r", "   ")  # so BERT's calls other white space of ASCII


def normalizing(definition: dict[str, Any] | None, library: Normalizer | None) -> Callable[[str], str]:
    """The function that normalizes a text.

    Args:
        definition: the normalizer's, in tokenizer.json.
        library: the same as an object.
    """
    if definition is None or library is None:
        return str
    known = _known(definition)

    def normalize(text: str) -> str:
        found = known(text)
        return library.normalize_str(text) if found is None else found

    return normalize


def _known(step: dict[str, Any]) -> Callable[[str], str | None]:
    """The same in Python; of a text for which it is not known what becomes of it, None."""
    kind = step["type"]
    if kind == "Sequence":
        return _in_turn([_known(one) for one in step["normalizers"]])
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: text if text.isascii() else None
    if kind == "Lowercase":
        return lambda text: text.lower() if text.isascii() else None
    if kind == "BertNormalizer":
        return lambda text: _bert(text, cleans=step["clean_text"], lowers=step["lowercase"])
    if kind == "Prepend":
        return lambda text: text and step["prepend"] + text
    if kind == "Replace" and step["pattern"].get("String"):
        return lambda text: text.replace(step["pattern"]["String"], step["content"])
    return lambda text: None


def _in_turn(steps: list[Callable[[str], str | None]]) -> Callable[[str], str | None]:
    def normalize(text: str) -> str | None:
        found: str | None = text
        for step in steps:
            found = None if found is None else step(found)
        return found

    return normalize


def _bert(text: str, *, cleans: bool, lowers: bool) -> str | None:
    if not text.isascii() or (cleans and REMOVED.search(text)):
        return None
    text = text.translate(SPACES) if cleans else text
    return text.lower() if lowers else text
