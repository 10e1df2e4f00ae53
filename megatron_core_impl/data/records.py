"""What files of records hold, whatever their format: documents or conversations, as mappings."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


class MalformedRecord(ValueError):
    """A record that cannot be used; the message is the reason."""
