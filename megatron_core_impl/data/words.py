"""The words that a tokenizer of Hugging Face splits a text into before its model sees them, found by Python's `re`.

The model encodes each word alone, so a word that comes again has the ids it had. The steps of a pre-tokenizer are patterns
(`word_patterns`) which are known for text of ASCII. Other characters are left to the library with what is around them, from a
place where the text can be cut to the next: between two characters of ASCII that no pattern joins, whatever else is in the
text, and behind the first of which no pattern looks at what follows.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_core_impl.data.word_patterns import ASCII, Characters, Part, characters, set_pattern, translated

NEAR = 256  # characters between others than ASCII that are encoded with them, at most
SHORT = 16  # characters, on average, of others than ASCII with what is around them that may come again
LONG = 1 << 18  # characters of a text of which not all words are listed at once
# Of this text, which has no longer words, a remembered segment is to hold few.
SAMPLE = "def add(left, right):\n    return left + right  # the sum of both\n"
SAMPLE_LONGEST = 12

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[!-/:-@\[-`{-~]"
# How a byte is written: printable ASCII as itself, the others by characters from U+0100 on.
BYTE_NAMES = {byte: chr(256 + number) for number, byte in enumerate([*range(33), 127])}


@dataclass(frozen=True)
class Step:
    """A step that splits: pieces are what its pattern matches, and what lies between, or that is dropped."""

    part: Part
    drops: bool = False

    def pattern(self) -> re.Pattern[str]:
        """The pattern whose matches are the pieces of a text of ASCII."""
        found, first = self.part.text, self.part.first
        if self.drops or self.part.alone == ASCII:
            return re.compile(found)
        # From a character at which nothing begins up to one at which something does.
        other = "(?s:.)" + (f"{set_pattern(ASCII & ~first)}*+" if first != ASCII else "")
        return re.compile(f"{found}|{other}(?:(?!{found}){other})*")

    def joins(self, a: str, b: str) -> bool:
        """Whether a text that is cut between two characters may have other pieces, the cut apart."""
        return bool(self.part.pairs >> (128 * ord(a) + ord(b)) & 1 or self.part.looked >> ord(a) & 1)

    def parts(self, b: str) -> bool:
        """Whether a piece always begins with this character, where it is not joined with the one before it."""
        return self.drops or bool(self.part.alone >> ord(b) & 1)


class Words:
    """Cuts a normalized text into segments, and segments into words.

    Args:
        prefix: what is put before a text that does not begin with one of `prefixed`.
        steps: the splits.
        finish: what becomes of a word then.
        done: how many steps of the pre-tokenizer this is.
    """

    def __init__(self, prefix: str, prefixed: str, steps: list[Step], finish: Callable[[str], str], done: int) -> None:
        self.done = done
        self._prefix, self._prefixed, self._finish = prefix, tuple(prefixed), finish
        patterns = [step.pattern() for step in steps if step.part.first or step.drops]
        # Segments are the pieces of the first steps that make short ones of text.
        count = 1
        while count < len(patterns) and max(map(len, _pieces(patterns[:count], SAMPLE))) > SAMPLE_LONGEST:
            count += 1
        self._cutting, self._within = patterns[:count], patterns[count:]
        # Where the text can be cut: behind these, before a space or a newline.
        before = {b: _safe_before(steps, b) for b in (" " if prefix else " \n")}
        self._cuts = {b: safe for b, safe in before.items() if safe}
        self._cut = re.compile("|".join(f"(?<={set_pattern(safe)})(?={b})" for b, safe in self._cuts.items()))
        self._clusters = re.compile(f"[^\\x00-\\x7f]++(?:[\\x00-\\x7f]{{1,{NEAR}}}+[^\\x00-\\x7f]++)*+")

    def segments(self, text: str) -> Iterable[str]:
        """The segments of a text."""
        if self._prefix and not text.startswith(self._prefixed):
            text = self._prefix + text
        if text.isascii():
            return self._sure(text)
        return self._mixed(text) if self._cuts else [text]

    def _sure(self, text: str) -> Iterable[str]:
        first, *others = self._cutting
        pieces: Iterable[str] = first.findall(text) if len(text) <= LONG else (match[0] for match in first.finditer(text))
        for pattern in others:
            pieces = chain.from_iterable(map(pattern.findall, pieces))
        return pieces

    def _mixed(self, text: str) -> Iterator[str]:
        done = 0
        for match in self._clusters.finditer(text):
            if match.end() <= done:
                continue
            start, found = self._cut_before(text, match.start(), done), self._cut.search(text, match.end())
            yield from self._sure(text[done:start])
            done = found.start() if found else len(text)
            parts = self._cut.split(text[start:done])
            if done - start > SHORT * len(parts):  # what is long rarely comes again, and is encoded faster at once
                parts = [text[start:done]]
            for part in parts:
                yield from self._sure(part) if part.isascii() else (part,)
        yield from self._sure(text[done:])

    def _cut_before(self, text: str, place: int, least: int) -> int:
        """The last place where the text can be cut, at most here."""
        while place > least:
            place = max(text.rfind(b, least, place) for b in self._cuts)
            if place > least and text[place - 1].isascii() and self._cuts[text[place]] >> ord(text[place - 1]) & 1:
                return place
        return least

    def words(self, segment: str) -> list[str]:
        """The words of a segment of ASCII, as what comes next sees them."""
        return [self._finish(word) for word in _pieces(self._within, segment)]


def _safe_before(steps: list[Step], b: str) -> Characters:
    if not all(step.part.is_near for step in steps) or not any(step.parts(b) for step in steps):
        return 0
    return characters("".join(a for a in map(chr, range(128)) if not any(step.joins(a, b) for step in steps)))


def _pieces(patterns: list[re.Pattern[str]], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        pieces = [word for piece in pieces for word in pattern.findall(piece)]
    return pieces


def steps_of(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of the pre-tokenizer in tokenizer.json."""
    splitter = definition.get("pre_tokenizer")
    return [] if splitter is None else splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]


def are_alike(definition: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether these steps, and the model, make of a piece the same wherever it is."""
    is_first = any(step["type"] == "Sequence" or step.get("prepend_scheme") == "first" for step in steps)
    return not is_first and not definition["model"].get("dropout")


def words_of(definition: dict[str, Any]) -> Words | None:
    """How a tokenizer splits what its normalizer gives, by the first of its steps, up to one that is not known; None where that
    is none.

    Args:
        definition: the content of tokenizer.json.
    """
    listed, known = steps_of(definition), list[Step]()
    if not listed:
        return None
    if listed[0]["type"] == "Metaspace":
        return _of_metaspace(listed[0]) if len(listed) == 1 and are_alike(definition, []) else None
    for step in map(_step, listed):
        if step is None:
            break
        known.append(step)
    done, last, prefix = len(known), listed[-1], ""
    is_bytes = last["type"] == "ByteLevel" and done == len(listed) - 1 and not (last["add_prefix_space"] and done)
    if is_bytes:
        done, prefix = len(listed), " " if last["add_prefix_space"] else ""
        if last["use_regex"] and (step := _split(GPT_2)) is not None:
            known.append(step)
    if not any(step.part.first for step in known) or not are_alike(definition, listed[done:]):
        return None
    return Words(prefix, " ", known, _byte_names if is_bytes else str, done)


def _byte_names(word: str) -> str:
    return word.translate(BYTE_NAMES)


def _of_metaspace(step: dict[str, Any]) -> Words | None:
    """Words that begin with a mark, which stands for a space; a text begins with one."""
    mark, pattern = step["replacement"], _split(" [^ ]*|[^ ]+")
    if not step["split"] or mark.isascii() or pattern is None:  # a text of ASCII must not hold marks of its own
        return None
    prefix = "" if step["prepend_scheme"] == "never" else " "
    return Words(prefix, f" {mark}", [pattern], lambda word: word.replace(" ", mark), 1)


def _split(pattern: str, *, drops: bool = False) -> Step | None:
    part = translated(pattern)
    return None if part is None else Step(part, drops)


def _step(step: dict[str, Any]) -> Step | None:
    """A step of a pre-tokenizer, if it is known."""
    kind, behavior = step.get("type"), step.get("behavior")
    if kind == "Split" and "Regex" in step["pattern"]:
        if behavior == "Isolated" or (behavior == "Removed" and step["invert"]):
            return _split(step["pattern"]["Regex"], drops=behavior == "Removed")
    elif kind == "Digits":
        return _split("[0-9]" if step["individual_digits"] else "[0-9]+")
    elif kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return _split(PUNCTUATION + ("+" if behavior == "Contiguous" else ""))
    elif kind == "Whitespace":
        return _split(r"\w+|[^\w\s]+", drops=True)
    elif kind == "WhitespaceSplit":
        return _split(r"\S+", drops=True)
    elif kind == "CharDelimiterSplit" and step["delimiter"].isascii():
        return _split(f"[^{re.escape(step['delimiter'])}]+", drops=True)
    elif kind == "BertPreTokenizer":
        return _split(rf"{PUNCTUATION}|[^\s!-/:-@\[-`{{-~]+", drops=True)
    return None
