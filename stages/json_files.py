"""The JSON files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one as transformers does: indented, texts readable."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
