"""The words that a tokenizer of Hugging Face splits a text into, found by the library itself.

Where its steps are not all known (`words`), they still need not be followed by the library's model: splitting takes less than
half of the library's time, and words come again. What it makes of a word then is remembered as that of a segment.
"""

from collections.abc import Callable
from typing import Any

from tokenizers import PreTokenizedString, Tokenizer
from tokenizers.pre_tokenizers import Sequence


def steps_of(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in tokenizer.json, those of sequences within it too."""
    if splitter is None:
        return []
    return [step for one in splitter["pretokenizers"] for step in steps_of(one)] if "pretokenizers" in splitter else [splitter]


def library_words(
    definition: dict[str, Any], library: Tokenizer
) -> tuple[Callable[[str], list[str]], Callable[[str], list[int]]] | None:
    """What splits a normalized text into words, and gives the ids of a word; None where nothing splits, or a word may have
    other ids another time.

    Args:
        definition: the content of tokenizer.json.
        library: the tokenizer.
    """
    splitter, listed = library.pre_tokenizer, (definition["pre_tokenizer"] or {}).get("pretokenizers", [])
    if splitter is None or definition["model"].get("dropout"):
        return None
    of_word = Tokenizer(library.model)  # the model is one
    if listed and listed[-1]["type"] == "ByteLevel":  # takes long, and does the same to a word wherever it is
        *first, of_word.pre_tokenizer = [splitter[number] for number in range(len(listed))]
        splitter = Sequence(first)

    def split(text: str) -> list[str]:
        found = PreTokenizedString(text)
        splitter.pre_tokenize(found)
        return [word for word, _, _ in found.get_splits("original", "byte")]  # of places, these take the least

    def encode(word: str) -> list[int]:
        ids: list[int] = of_word.encode_batch_fast([word], add_special_tokens=False)[0].ids
        return ids

    return split, encode
