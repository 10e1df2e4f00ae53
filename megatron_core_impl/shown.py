"""Values that others wrote, for messages: short, whatever they are. No torch in here.

`repr` walks into a value. A list that holds a list twice, which holds a list twice, and so on, is a hundred bytes in a file and
has no end in a message. This looks at a few items of the first levels and at no others.
"""

from itertools import islice

_ITEMS, _DEPTH, _CHARACTERS, _BITS = 4, 2, 60, 200


def shown(value: object, depth: int = _DEPTH) -> str:
    """A value as Python writes it, where it is short; else its beginning."""
    match value:
        case None | bool() | float():
            return repr(value)
        case int():
            return repr(value) if value.bit_length() <= _BITS else f"a number of {value.bit_length():,} bits"
        case str() | bytes():
            return repr(value) if len(value) <= _CHARACTERS else f"{value[:_CHARACTERS]!r}…"
        case dict() if depth:
            pairs = (f"{shown(key, depth - 1)}: {shown(item, depth - 1)}" for key, item in islice(value.items(), _ITEMS))
            return f"{{{', '.join([*pairs, *_more(len(value))])}}}"
        case list() | tuple() if depth:
            items = [*(shown(item, depth - 1) for item in islice(value, _ITEMS)), *_more(len(value))]
            return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
    return f"a {type(value).__name__}"


def _more(count: int) -> list[str]:
    return [f"… {count - _ITEMS:,} more"] if count > _ITEMS else []
