"""Added tokens of a tokenizer of Hugging Face, which the library finds in a text before anything else, at the first place and
the longest there. What lies between is encoded piece by piece, each like a text of its own."""

import re
from collections.abc import Callable, Iterable

from tokenizers import AddedToken

Piece = str | int  # a text, or the id of an added token
DEEPEST = 128  # characters of a token up to which patterns are nested


class _Tokens:
    """Finds tokens in text.

    Args:
        tokens: ids of what is looked for, as it is looked for; None: where this is found, the library must go on.
        kept: what is looked for, and stays text.
    """

    def __init__(self, tokens: dict[str, int | None], kept: set[str]) -> None:
        self._tokens, self._kept = tokens, kept
        texts = [*tokens, *kept]
        self._pattern = re.compile(longest_of(texts)) if texts else None

    def split(self, text: str) -> list[Piece] | None:
        """The ids of the tokens in a text and what lies between them, in order; None where the library must do it."""
        parts: list[Piece] = []
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match[0] in self._kept:
                continue
            number = self._tokens[match[0]]
            if number is None:
                return None
            if match.start() > done:
                parts.append(text[done : match.start()])
            parts.append(number)
            done = match.end()
        if done < len(text):
            parts.append(text[done:])
        return parts


def longest_of(texts: list[str]) -> str:
    """A pattern for the longest of some texts; what they begin with is looked at once."""
    if max(map(len, texts)) > DEEPEST:
        return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    begun: dict[str, list[str]] = {}
    for text in filter(None, texts):
        begun.setdefault(text[0], []).append(text[1:])
    nested = (re.escape(first) + (re.escape(rest[0]) if len(rest) == 1 else longest_of(rest)) for first, rest in begun.items())
    return f"(?:{'|'.join(nested)}){'?' if '' in texts else ''}"


def found_first(
    tokens: Iterable[AddedToken],
    id_of: Callable[[str], int | None],
    normalize: Callable[[str], str],
    *,
    special: bool,
    alike: bool,
) -> Callable[[str], list[Piece] | None]:
    """What finds the tokens of a text and normalizes what lies between; it gives None where the library must do it.

    Args:
        tokens: the tokenizer's.
        id_of: by it, the id of a token.
        normalize: what its normalizer does.
        special: whether the special ones are found too.
        alike: whether what follows a token is encoded like a text of its own.
    """
    found: list[dict[str, int | None]] = [{}, {}]  # in a text, and in what has been normalized
    kept: list[set[str]] = [set(), set()]
    for token in tokens:
        text = normalize(token.content) if token.normalized else token.content
        there, stays = found[token.normalized], kept[token.normalized]
        if token.special and not special and text:
            stays.add(text)
        else:
            is_plain = alike and text and text not in there and not (token.single_word or token.lstrip or token.rstrip)
            there[text] = id_of(token.content) if is_plain else None
    for there, stays in zip(found, kept, strict=True):
        there.update(dict.fromkeys(there.keys() & stays))
        stays.difference_update(there)
    raw, normal = map(_Tokens, found, kept)

    def pieces(text: str) -> list[Piece] | None:
        parts: list[Piece] = []
        raw_parts = raw.split(text)
        for part in raw_parts or ():
            inner = [part] if isinstance(part, int) else normal.split(normalize(part))
            if inner is None:
                return None
            parts += inner
        return None if raw_parts is None else parts

    return pieces
