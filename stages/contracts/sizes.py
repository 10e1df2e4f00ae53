"""Sizes of files as a person writes them: 5GB, 500MB, 2GiB, or a number of bytes."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power for unit, base in (("B", 1000), ("IB", 1024)) for power, prefix in enumerate("KMGT", start=1)
}


def parse_size(value: Any) -> int:
    """The bytes of a size.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{value!r} must be a number of bytes, or a size such as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str)]  # a field's type
