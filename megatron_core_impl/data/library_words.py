"""Words of a tokenizer of Hugging Face, found by the library itself, where Python does not know how (`words`).

Finding words takes the library less than half of its time. The rest is what it makes of each, which can be remembered here too.
"""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from tokenizers import NormalizedString, PreTokenizedString, Regex, Tokenizer
from tokenizers.pre_tokenizers import Sequence


def steps_of(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in tokenizer.json, those of sequences within it among them."""
    if not splitter:
        return []
    return [step for one in splitter["pretokenizers"] for step in steps_of(one)] if "pretokenizers" in splitter else [splitter]


def library_words(
    definition: dict[str, Any], library: Tokenizer
) -> tuple[Callable[[str], Iterable[str]], Callable[[str], list[int]]] | None:
    """What splits a normalized text into words, and gives the ids of one; None where nothing splits, or a word may have other
    ids another time.

    Args:
        definition: the content of tokenizer.json.
        library: the tokenizer.
    """
    splitter, of_word = library.pre_tokenizer, Tokenizer(library.model)  # the model is one
    if splitter is None or definition["model"].get("dropout"):
        return None
    steps = definition["pre_tokenizer"].get("pretokenizers", [definition["pre_tokenizer"]])
    if len(steps) > 1 and steps[-1]["type"] == "ByteLevel":  # takes long, and does the same to a word wherever it is
        *first, of_word.pre_tokenizer = [splitter[number] for number in range(len(steps))]
        splitter, steps = Sequence(first), steps[:-1]

    def split(text: str) -> Iterable[str]:
        found = PreTokenizedString(text)
        splitter.pre_tokenize(found)
        return [word for word, _, _ in found.get_splits("original", "byte")]  # of places, these take the least

    def encode(word: str) -> list[int]:
        ids: list[int] = of_word.encode_batch_fast([word], add_special_tokens=False)[0].ids
        return ids

    return _isolating(steps) or split, encode


def _isolating(steps: list[dict[str, Any]]) -> Callable[[str], Iterable[str]] | None:
    """The same for patterns whose matches are words, and what is between them: twice as fast without places."""
    if not all(step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] for step in steps):
        return None
    patterns = [Regex(found) if (found := step["pattern"].get("Regex")) else step["pattern"]["String"] for step in steps]
    text_of = attrgetter("normalized")

    def split(text: str) -> Iterable[str]:
        pieces = [NormalizedString(text)]
        for pattern in patterns:
            pieces = [part for piece in pieces for part in piece.split(pattern, "isolated")]
        return filter(None, map(text_of, pieces))  # an empty match is none

    return split
