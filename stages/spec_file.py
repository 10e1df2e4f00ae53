"""The file that tells a stage what to do: reading it, and what --help says of it."""

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stages.contracts.specs import SPECS, Spec
from stages.outcomes import BadInput


def spec_help(nodes: list[str]) -> str:
    """The settings of a spec, for --help."""
    lines = ["spec:"]
    for node in nodes:
        cls = SPECS[node]
        if len(nodes) > 1:
            lines.append(f"  {node}: {(cls.__doc__ or '').splitlines()[0]}")
        lines.append('  "workspace"  absolute path of the workspace; the result goes to <workspace>/' + cls.STAGE + "/<key>")
        for name, kind in cls.INPUTS.items():
            lines.append(f'  "inputs"."{name}"  {{"path": folder of a {kind.__name__}, relative to the workspace}}')
        for name, field in cls.model_fields.items():
            if name in ("workspace", "inputs"):
                continue
            inner = getattr(field.annotation, "model_fields", None)
            if inner is None:
                lines.append(f'  "{name}"  {_setting_help(field)}')
            else:
                lines += [f'  "{name}"."{key}"  {_setting_help(sub)}' for key, sub in inner.items()]
    lines.append("exit codes: 0 done, 1 defect, 2 bad input, 3 failed check, 4 interrupted (run again to go on)")
    return "\n".join(lines)


def _setting_help(field: FieldInfo) -> str:
    """What a setting means, its legal values where they are few, its default in brackets."""
    legal = [str(value) for value in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    parts = [field.description or "", f" ({' | '.join(legal)})" if len(legal) > 1 else ""]
    if not field.is_required() and field.default is not None and field.default != ():
        parts.append(f" [{json.dumps(field.default)}]")
    return "".join(parts)


def read_spec(path: Path, node: str | dict[str, str]) -> Spec:
    """Read and validate a spec.

    Raises:
        BadInput: the file is missing, not JSON, or not this stage's spec; the message names the key.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --help shows what a spec looks like") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if isinstance(node, dict):
        found = [name for key, name in node.items() if isinstance(data, dict) and key in data]
        if len(found) != 1:
            raise BadInput(f"{path}: must have exactly one of the keys {', '.join(node)}")
        node = found[0]
    try:
        return SPECS[node].model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "spec"
        raise BadInput(f"{path}: {where}: {first['msg']} (got {first['input']!r})") from None
