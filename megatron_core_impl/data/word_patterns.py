"""Patterns of words from tokenizer.json, as Python's `re` finds the same matches in text of ASCII.

The tokenizers library searches with Oniguruma, in which \\p{L} is all letters of its Unicode. Among the 128 characters of ASCII
every such class is a set that never changes, so a pattern becomes one of `re` that matches the same there. Only what both
engines treat alike is translated: sets of characters, groups, alternatives, looks ahead and back, and quantifiers.

What a translated pattern can match is also read from it. That says where a text with other characters can be cut (`words`).
"""

import re
import string
import unicodedata
from dataclasses import dataclass, field, replace

Characters = int  # a set of ASCII: a bit for each
Pairs = int  # a set of two neighbours: bit 128 × the first + the second

ASCII: Characters = (1 << 128) - 1
SCRIPTS = ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Arabic", "Cyrillic", "Greek", "Hebrew", "Devanagari")  # not ASCII


class Untranslated(ValueError):
    """A pattern holds what is not known to mean the same."""


def characters(text: str) -> Characters:
    """The set of a text's characters that are ASCII."""
    return sum(1 << code for code in set(map(ord, text)) if code < 128)


def members(of: Characters) -> list[str]:
    """The characters of a set, in order."""
    return [chr(code) for code in range(128) if of >> code & 1]


def set_pattern(of: Characters) -> str:
    """A pattern for one character of a set."""
    listed = "".join(re.escape(c) if c.isprintable() else f"\\x{ord(c):02x}" for c in members(of))
    return f"[{listed}]" if of else r"[^\x00-\x7f]"


@dataclass(frozen=True)
class Part:
    """A part of a pattern, and what it can match in any text. Sets may hold more than that, but for `alone`."""

    text: str  # for `re`
    is_empty: bool = False  # it may match nothing
    is_free: bool = False  # it can match nothing, whatever is near
    first: Characters = 0
    last: Characters = 0
    pairs: Pairs = field(default=0, repr=False)
    alone: Characters = 0  # where one of these is, it matches, whatever follows
    looks_at_once: bool = False  # it may look at what is near before it takes a character
    looked: Characters = 0  # it may look at what follows one of these
    keeps: bool = False  # it holds a quantifier that gives nothing back
    is_near: bool = True  # it looks at one character at most, and ahead


def translated(pattern: str) -> Part | None:
    """The same for text of ASCII; None where that is not known. No part of it is a group that captures.

    Args:
        pattern: of tokenizers, in its dialect of Oniguruma.
    """
    reader = _Reader(pattern)
    try:
        part = reader.alternatives()
        if reader.next() or part.is_empty:  # what tokenizers does with an empty match is not followed
            return None
        re.compile(part.text)
    except (Untranslated, re.error, OverflowError):  # a look back at texts of different lengths
        return None
    return part


def _set(of: Characters) -> Part:
    return Part(set_pattern(of), first=of, last=of, alone=of)


def _joined(a: Part, b: Part) -> Part:
    """One after the other."""
    across = sum(b.first << 128 * code for code in range(128) if a.last >> code & 1)
    return Part(
        a.text + b.text,
        is_empty=a.is_empty and b.is_empty,
        is_free=a.is_free and b.is_free,
        first=a.first | (b.first if a.is_empty else 0),
        last=b.last | (a.last if b.is_empty else 0),
        pairs=a.pairs | b.pairs | across,
        alone=(a.alone if b.is_free else 0) | (b.alone & ~(a.first if a.keeps else 0) if a.is_free else 0),
        looks_at_once=a.looks_at_once or (a.is_empty and b.looks_at_once),
        looked=a.looked | b.looked | (a.last if b.looks_at_once else 0),
        keeps=a.keeps or b.keeps,
        is_near=a.is_near and b.is_near,
    )


def _either(a: Part, b: Part) -> Part:
    return Part(
        f"{a.text}|{b.text}",
        is_empty=a.is_empty or b.is_empty,
        is_free=a.is_free or b.is_free,
        first=a.first | b.first,
        last=a.last | b.last,
        pairs=a.pairs | b.pairs,
        alone=a.alone | b.alone,
        looks_at_once=a.looks_at_once or b.looks_at_once,
        looked=a.looked | b.looked,
        keeps=a.keeps or b.keeps,
        is_near=a.is_near and b.is_near,
    )


def _repeated(part: Part, quantifier: str, least: int, is_once: bool) -> Part:
    """A part with a quantifier."""
    if part.is_empty:
        raise Untranslated("engines differ in how often they repeat nothing")
    again = part if is_once else _joined(part, part)
    return replace(
        again,
        text=part.text + quantifier,
        is_empty=least == 0,
        is_free=least == 0,
        first=part.first,
        last=part.last,
        alone=part.alone if least <= 1 and not part.keeps else 0,
    )


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0
        self._any_case = False

    def next(self, size: int = 1) -> str:
        """What comes next; "" at the end."""
        return self._pattern[self._at : self._at + size]

    def _take(self, expected: re.Pattern[str] | str) -> str:
        """What comes next, if it is that; else ""."""
        found = re.compile(expected).match(self._pattern, self._at)
        self._at = found.end() if found else self._at
        return found[0] if found else ""

    def alternatives(self) -> Part:
        """Up to the end, or the bracket that closes a group."""
        part = self._sequence()
        while self._take(r"\|"):
            part = _either(part, self._sequence())
        return part

    def _sequence(self) -> Part:
        part = Part("", is_empty=True, is_free=True)
        while self.next() not in ("", "|", ")"):
            part = _joined(part, self._quantified())
        return part

    def _quantified(self) -> Part:
        part = self._atom()
        if self.next() in ("*", "+", "?"):
            sign = self._take(r"[*+?]")
            mode = self._take(r"[+?]")
            if mode == "+" and part.text.startswith("("):  # early versions of Python 3.11 are wrong about some
                raise Untranslated("a group that gives nothing back")
            part = _repeated(part, sign + mode, int(sign == "+"), sign == "?")
            part = replace(part, keeps=part.keeps or mode == "+")
        elif interval := self._take(r"\{[0-9]+(?:,[0-9]*)?\}"):
            least, _, most = interval[1:-1].partition(",")
            if int(least) > int(most or least) or most == "0" or interval == "{0}":
                raise Untranslated(interval)
            part = _repeated(part, interval, int(least), False)
            if self.next() == "+":  # not possessive here: it repeats what was repeated
                self._take(r"\+")
                part = _repeated(replace(part, text=f"(?:{part.text})"), "+", 1, False)
        else:
            return part
        if self.next() in ("*", "+", "?", "{"):
            raise Untranslated("{1,3}?, or another row of quantifiers")
        return part

    def _atom(self) -> Part:
        if self.next() == "(":
            return self._group()
        if self.next() == "[":
            return _set(self._listed())
        if self.next() == "\\":
            found = self._escaped()
            return _set(self._one(found) if isinstance(found, str) else found)
        character = self._take(r"(?s:.)")
        if character in "*+?{}]^":
            raise Untranslated(character)
        if character == ".":
            return _set(ASCII & ~characters("\n"))
        if character == "$":  # the end of a line
            return Part(r"(?![^\n])", is_empty=True, looks_at_once=True)
        return _set(self._one(character))

    def _group(self) -> Part:
        kind = self._take(r"\((?:\?(?::|i:|<?[=!]|<[A-Za-z_][A-Za-z0-9_]*>))?")  # nothing that is translated uses a name
        before, self._any_case = self._any_case, self._any_case or kind == "(?i:"
        part = self.alternatives()
        self._any_case = before
        if not self._take(r"\)"):
            raise Untranslated("a group that is not closed")
        if kind in ("(", "(?:", "(?i:") or kind.endswith(">"):
            return replace(part, text=f"(?:{part.text})")
        is_character = re.fullmatch(r"\[(?:[^\]\\]|\\.)*\]", part.text, re.DOTALL) is not None
        return Part(f"{kind}{part.text})", is_empty=True, looks_at_once=True, is_near=is_character and "<" not in kind)

    def _listed(self) -> Characters:
        """The set in square brackets."""
        is_not = self._take(r"\[\^?") == "[^"
        if self.next() == "]" or (is_not and self._any_case):
            raise Untranslated("] as a character, or what is not of a set in any case")
        found, common = Characters(0), ASCII
        while not self._take(r"\]"):
            if self._take("&&"):  # what is before and what is behind it have in common
                if self._any_case or self._pattern[self._at - 3] in "[^&" or self.next() in ("]", "&"):
                    raise Untranslated("in any case, or with nothing")
                common, found = common & found, Characters(0)
            member = self._member()
            if self.next() == "-" and self.next(2) != "-]":  # else it stands for itself
                self._at += 1
                first, last = member, self._member()
                if not (isinstance(first, str) and isinstance(last, str) and "-" != first <= last) or self.next() == "-":
                    raise Untranslated("a range")
                found |= self._one(first) | self._one(last)
                member = characters("".join(map(chr, range(ord(first), min(ord(last), 127) + 1))))
            found |= self._one(member) if isinstance(member, str) else member
        found &= common
        return ASCII & ~found if is_not else self._cased(found)

    def _member(self) -> str | Characters:
        """A member of a set: a character, or a class."""
        if self.next() == "\\":
            return self._escaped()
        if self.next() in ("", "]") or self.next(2) in ("&&", "[:"):
            raise Untranslated("what two sets have in common, or a class of POSIX")
        return self._listed() if self.next() == "[" else self._take(r"(?s:.)")

    def _escaped(self) -> str | Characters:
        """What a backslash means: a character, or a class."""
        if code := self._take(r"\\(?:x[0-7][0-9A-Fa-f]|u[0-9A-Fa-f]{4})"):
            return chr(int(code[2:], 16))
        if control := self._take(r"\\[tnrfv]"):
            return {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}[control[1]]
        if literal := self._take(r"\\[!-/:-@\[-`{-~ ]"):
            return literal[1]
        kind = self._take(r"\\(?:[pP]\{[A-Za-z]+\}|[sSdDwW])")
        if not kind or self._any_case:
            raise Untranslated("a class in any case, or another escape")
        found = _property(kind[3:-1]) if kind[1] in "pP" else _NAMED[kind[1].lower()]
        return ASCII & ~found if kind[1].isupper() else found

    def _one(self, character: str) -> Characters:
        if self._any_case and not character.isascii():
            raise Untranslated("a character that may be several of ASCII in another case, as ß")
        return self._cased(characters(character))

    def _cased(self, found: Characters) -> Characters:
        return characters("".join(c.lower() + c.upper() for c in members(found))) if self._any_case else found


def _property(name: str) -> Characters:
    """The ASCII of a class or a script of Unicode."""
    if name in SCRIPTS:
        return 0
    if name not in _CATEGORIES:
        raise Untranslated(name)
    return characters("".join(chr(code) for code in range(128) if unicodedata.category(chr(code)).startswith(name)))


_CATEGORIES = frozenset(
    [
        "L",
        "Lu",
        "Ll",
        "Lt",
        "Lm",
        "Lo",
        "M",
        "Mn",
        "Mc",
        "Me",
        "N",
        "Nd",
        "Nl",
        "No",
        "P",
        "Pc",
        "Pd",
        "Ps",
        "Pe",
        "Pi",
        "Pf",
        "Po",
        "S",
        "Sm",
        "Sc",
        "Sk",
        "So",
        "Z",
        "Zs",
        "Zl",
        "Zp",
    ]
)
_NAMED = {
    "s": characters("\t\n\v\f\r "),
    "d": characters(string.digits),
    "w": characters(string.ascii_letters + string.digits + "_"),
}
