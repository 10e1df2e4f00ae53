"""A split by a pattern that is not translated (`word_patterns`), as the library does it.

That is a quarter of its time: more goes into what becomes of each word, which is remembered (`segments`).
"""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from tokenizers import NormalizedString, Regex

from megatron_core_impl.data.words import are_alike, steps_of

BEHAVIORS = {  # what becomes of what the pattern matches, as tokenizer.json and the library call it
    "Isolated": "isolated",
    "Removed": "removed",
    "Contiguous": "contiguous",
    "MergedWithPrevious": "merged_with_previous",
    "MergedWithNext": "merged_with_next",
}


def untranslated_split(definition: dict[str, Any]) -> Callable[[str], Iterable[str]] | None:
    """What splits a normalized text as the first step of a tokenizer does; None where that is no plain split, or no step is
    behind it: then there is less to gain than to remember costs.

    Args:
        definition: the content of tokenizer.json.
    """
    first, *left = steps_of(definition) or [{}]
    is_plain = first.get("type") == "Split" and "Regex" in first["pattern"] and not first["invert"]
    if not left or not is_plain or not are_alike(definition, left):
        return None
    pattern, behavior, text_of = Regex(first["pattern"]["Regex"]), BEHAVIORS[first["behavior"]], attrgetter("normalized")
    # An empty match gives an empty word, which has no ids.
    return lambda text: map(text_of, NormalizedString(text).split(pattern, behavior))
