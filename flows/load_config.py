"""A configuration from YAML and `--set`, or every problem of it as one line that says where, what, and what is legal."""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stages.contracts import preflight
from stages.contracts.config import Frozen, PipelineConfig
from stages.contracts.sources import expand, is_glob


class BadConfig(ValueError):
    """A configuration that cannot be run. `problems` are whole lines for people."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def load_config(file: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a file, apply `key.path=value` overrides, validate.

    Raises:
        BadConfig: with every problem that could be found at once.
    """
    data = _read(file)
    sources: dict[tuple[str, ...], str] = {}  # path -> the override it came from, which may have made the section, too
    for text in overrides:
        sources |= dict.fromkeys(_override(data, text), text)
    problems = [f"{_where(file, sources, path)}: {told}" for path, told in _impossible_numbers(data)]
    if not problems:
        try:
            # Strict, but as JSON: a list is a tuple, a whole number is a float, and nothing else is what it is not.
            return PipelineConfig.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            # First, for whoever mends only what the batches need of a layout would be refused again.
            problems += [_line(str(file), told) for told in preflight.refused_layout(data)]
            for problem in error.errors(include_url=False):
                loc = tuple(part for part in problem["loc"] if isinstance(part, str))
                problems.append(_line(_where(file, sources, loc), explain(problem)))
    raise BadConfig(problems)


def check_ready(config: PipelineConfig, where: str) -> None:
    """What else can be known to be wrong before any stage starts.

    Raises:
        BadConfig: a local source that is not there, a model that the layout does not fit, a token that is missing.
    """
    problems = []
    sources = [("model.source", config.model.source)]
    sources += [(f"{named.key}.source", named.settings.source) for named in config.data.sources()]
    for key, source in sources:
        if _looks_local(source) and not _exists(source):
            problems.append(f"{key}: {source}: no such file or folder (seen from {Path.cwd()})")
    if config.push.to == "hub" and not os.environ.get("HF_TOKEN"):
        problems.append(
            "push.to: hub needs a token: set the environment variable HF_TOKEN to one that may write to "
            f"{config.push.repo}, or push.to: dry-run"
        )
    try:
        problems += preflight.check(config)
    except Exception as error:  # a broken config.json may do anything to what reads it
        problems.append(f"model.source or push: cannot be checked ({type(error).__name__}: {error})")
    if problems:
        raise BadConfig([f"{where}: {problem}" for problem in problems])


def _exists(source: str) -> bool:
    try:
        return bool(expand(source)[1]) if is_glob(source) else Path(source).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no such user, too long a name, a NUL byte
        return False


def _looks_local(source: str) -> bool:
    """Whether a source can only be a path: a Hub id is `name` or `owner/name`."""
    is_file = source.endswith((".jsonl", ".ndjson", ".gz", ".zst", ".parquet", "/"))
    return is_glob(source) or source.startswith((".", "/", "~")) or is_file or source.count("/") > 1


def _read(file: Path) -> dict[str, Any]:
    try:
        data = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConfig([f"{file}: no such file"]) from None
    except IsADirectoryError:
        inside = ", ".join(map(str, sorted(file.glob("*.y*ml")))) or "none"
        raise BadConfig([f"{file}: is a folder; name a configuration, a YAML file. In this folder: {inside}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig([f"{file}: cannot be read: {error}"]) from None
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "([^"]*)"', str(error))
        at = error.problem_mark
        line = f", line {at.line + 1}" if at is not None else ""
        raise BadConfig([f"{file}{line}: {key[1] if key else 'a key'}: stands here twice; keep one"]) from None
    except MarkedYAMLError as error:
        at = error.problem_mark
        line = f", line {at.line + 1}, column {at.column + 1}" if at is not None else ""
        raise BadConfig([f"{file}{line}: not YAML: {error.problem}"]) from None
    except YAMLError as error:
        raise BadConfig([f"{file}: not YAML: {str(error).splitlines()[0]}"]) from None
    if not isinstance(data, dict):
        raise BadConfig([f"{file}: must be a mapping with the keys {', '.join(PipelineConfig.model_fields)}"])
    return data


def _override(data: dict[str, Any], text: str) -> list[tuple[str, ...]]:
    """Put one `a.b=value` into the data. Returns the paths that were not there like this before."""
    key, sign, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not sign or not all(path):
        raise BadConfig([f"--set {text}: must be key.path=value, e.g. --set train.lr=1e-4"])
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        parsed = value
    here, made = data, [path]
    for depth, part in enumerate(path[:-1], start=1):
        inner = here.get(part)
        if inner is None:
            inner = here[part] = {}
            made.append(path[:depth])
        if not isinstance(inner, dict):
            raise BadConfig([f"--set {text}: {part} is no section"])
        here = inner
    here[path[-1]] = parsed
    return made


def _impossible_numbers(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _impossible_numbers(value, (*path, str(key)))
    elif isinstance(data, float) and not math.isfinite(data):
        yield path, f"{data} is not a number that can be used"


def _where(file: Path, sources: dict[tuple[str, ...], str], path: tuple[str, ...]) -> str:
    """Where a person has to look: the override that a key, or the section it is in, came from, else the file."""
    key = ".".join(path)
    for length in range(len(path), 0, -1):
        if text := sources.get(path[:length]):
            return f"--set {text}" if text.partition("=")[0].strip() == key else f"--set {text}: {key}"
    return ": ".join(filter(None, [str(file), key]))


def _line(where: str, told: str) -> str:
    return " ".join(f"{where}: {told}".split("\n"))


def explain(problem: ErrorDetails) -> str:
    """A pydantic error in a person's words: the value, and what is legal instead."""
    loc = tuple(part for part in problem["loc"] if isinstance(part, str))
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    got = json.dumps(value, ensure_ascii=False, default=str)
    got = got if len(got) <= 60 else got[:57] + "…"
    section, field = _find(loc)
    if kind == "extra_forbidden":
        return f"unknown key. {_suggest(loc)}"
    if kind == "missing":
        return f"missing. {_about(section, field)}"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", str(context["expected"])) or [str(context["expected"])]
        return f"{got} is not legal. Legal here: {', '.join(legal)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        keys = ", ".join(section.model_fields) if section is not None else ""
        return f"{got} is no section. It must have keys of: {keys}"
    needs = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text (in quotes, where it looks like a number)",
        "tuple_type": "a list",
        "string_too_short": "text that is not empty",
        "too_short": "a list that is not empty",
        "greater_than": f"greater than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
    }.get(kind)
    if needs is None:
        return f"{got} is not legal. {_about(section, field)}"
    return f"{got} must be {needs}"


def _find(loc: tuple[str, ...]) -> tuple[type[Frozen] | None, str]:
    """The class of a section, or that of the section a field is in, and the field's name."""
    section: type[Frozen] | None = PipelineConfig
    for part in loc:
        field = section.model_fields.get(part) if section is not None else None
        inner = field.annotation if field is not None else None
        if not (isinstance(inner, type) and issubclass(inner, Frozen)):
            return section, part
        section = inner
    return section, ""


def _about(section: type[Frozen] | None, field: str) -> str:
    if section is None or field not in section.model_fields:
        return "It is needed; it has the keys " + ", ".join(section.model_fields) if section is not None else ""
    return f"{field} is: {section.model_fields[field].description}"


def _suggest(loc: tuple[str, ...]) -> str:
    """What was probably meant by a key that does not exist."""
    section, _ = _find(loc[:-1])
    siblings = list(section.model_fields) if section is not None else []
    if close := difflib.get_close_matches(loc[-1], siblings, n=1, cutoff=0.6):
        return f"Did you mean {'.'.join((*loc[:-1], close[0]))}?"
    everywhere = {name: f"{part}.{name}" for part, names in _sections() for name in names}
    if close := difflib.get_close_matches(loc[-1], everywhere, n=1, cutoff=0.8):
        return f"Did you mean {everywhere[close[0]]}?"
    return f"Legal here: {', '.join(siblings)}"


def _sections() -> Iterator[tuple[str, list[str]]]:
    for part, field in PipelineConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen):
            yield part, list(field.annotation.model_fields)
