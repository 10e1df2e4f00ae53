"""A configuration from YAML and `--set`, or from a flow's parameters; or every problem of it as one line that says where, what,
and what is legal."""

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from flows.asked.config_errors import KeyPath, explain, key_of
from flows.asked.plan import plan
from stages.contracts import artifacts as a
from stages.contracts import preflight, publishing
from stages.contracts.config import PipelineConfig
from stages.contracts.sources import expand, is_glob
from stages.contracts.training_job import planned_job


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
    with _ends(str(file)):
        return _checked(_read(file), overrides, where=str(file), option="--set ")


def given_config(
    config: PipelineConfig | dict[str, Any], overrides: Sequence[str] = (), *, where: str = "config"
) -> PipelineConfig:
    """A configuration that came as a parameter of a flow, in a form's fields or as JSON, with overrides as after `--set`.

    Raises:
        BadConfig: with every problem that could be found at once.
    """
    if isinstance(config, PipelineConfig):
        if not overrides:
            return config
        config = config.model_dump(mode="json")
    with _ends(where):
        return _checked(copy.deepcopy(config), overrides, where=where, option="overrides: ")


@contextlib.contextmanager
def _ends(where: str) -> Iterator[None]:
    """YAML can say what has no end: `a: &a [*a]`."""
    try:
        yield
    except RecursionError:
        raise BadConfig([f"{where}: a list or section holds itself, or is nested too deeply: write it out"]) from None


def _checked(data: dict[str, Any], overrides: Sequence[str], *, where: str, option: str) -> PipelineConfig:
    """Apply overrides, which errors call `option`, and validate."""
    sources: dict[KeyPath, str] = {}  # path -> the override it came from, which may have made the section, too
    for text in overrides:
        sources |= dict.fromkeys(_override(data, text, option), option + text)
    problems = [_line(_where(where, sources, path), told) for path, told in _impossible(data)]
    if not problems:
        try:
            # Strict, but as JSON: a list is a tuple, a whole number is a float, and nothing else is what it is not.
            return PipelineConfig.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            # First, for whoever mends only what the batches need of a layout would be refused again.
            problems += [_line(where, told) for told in preflight.refused_layout(data)]
            problems += [
                _line(_where(where, sources, problem["loc"]), explain(problem))
                for problem in error.errors(include_url=False)
                if not (problem["type"] == "too_short" and problem["input"])  # told of a list whose items are wrong
            ]
    raise BadConfig(problems)


def check_ready(config: PipelineConfig, where: str) -> None:
    """What else can be known to be wrong before any stage starts.

    Raises:
        BadConfig: a local source that is not there, a model that the layout does not fit, a token that is missing.
    """
    problems = []
    sources = [("model.source", config.model.source)]
    files = [named for named in config.data.sources() if named.settings.format != "tokenized"]  # that is preflight's
    sources += [(f"{named.key}.source", named.settings.source) for named in files]
    for key, source in sources:
        if _looks_local(source) and not _exists(source):
            problems.append(f"{key}: {source}: no such file or folder (seen from {Path.cwd()})")
    problems += _of_token(config)
    try:
        problems += preflight.check(config)
        problems += _of_made_data(config)
    except Exception as error:  # a broken config.json may do anything to what reads it
        problems.append(f"model.source or push: cannot be checked ({type(error).__name__}: {error})")
    if problems:
        raise BadConfig([f"{where}: {problem}" for problem in problems])


def check_push(config: PipelineConfig, where: str) -> None:
    """The same for a run that only publishes.

    Raises:
        BadConfig: a token that is missing, a folder that is taken.
    """
    told = publishing.in_the_way(config.push)
    if problems := [*_of_token(config), *([f"push.{told}"] if told else [])]:
        raise BadConfig([f"{where}: {problem}" for problem in problems])


def _of_token(config: PipelineConfig) -> list[str]:
    if config.push.to != "hub" or os.environ.get("HF_TOKEN"):
        return []
    may = f"may write to {config.push.repo}"
    return [f"push.to: hub needs a token: set the environment variable HF_TOKEN to one that {may}, or push.to: dry-run"]


def _of_made_data(config: PipelineConfig) -> list[str]:
    """What training would find wrong with the data, where they are tokenized already."""
    made = {node.node: node.artifact for node in plan(config)}
    dataset, model = made["preprocess"], made["download-model"]
    if not isinstance(dataset, a.DatasetArtifact) or not isinstance(model, a.ModelArtifact):
        return []
    try:
        planned_job(config, dataset, model.model)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _exists(source: str) -> bool:
    try:
        return bool(expand(source)[1]) if is_glob(source) else Path(source).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no such user, too long a name, a NUL byte
        return False


def _looks_local(source: str) -> bool:
    """Whether a source can only be a path: a Hub id is `name` or `owner/name`."""
    is_file = source.endswith((".jsonl", ".ndjson", ".json", ".gz", ".zst", ".parquet", "/"))
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


def _override(data: dict[str, Any], text: str, option: str) -> list[KeyPath]:
    """Put one `a.b=value` or `a.b[0].c=value` into the data. Returns the paths that were not there like this before."""
    key, sign, value = text.partition("=")
    path = _path(key.strip())
    if not sign or not path:
        raise BadConfig([f"{option}{text}: must be key.path=value, e.g. {option}train.lr=1e-4 or data.blend[0].weight=2"])
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        parsed = value
    here: Any = data
    made = [path]
    for depth, part in enumerate(path):
        if isinstance(part, int):
            if not isinstance(here, list) or part >= len(here):
                told = f"has {len(here)} items, the first is [0]" if isinstance(here, list) else "is no list"
                raise BadConfig([f"{option}{text}: {key_of(path[:depth])} {told}"])
        elif not isinstance(here, dict):
            raise BadConfig([f"{option}{text}: {key_of(path[:depth])} is no section"])
        if depth == len(path) - 1:
            here[part] = parsed
        elif isinstance(part, str) and here.get(part) is None and isinstance(path[depth + 1], str):
            here[part] = {}
            made.append(path[: depth + 1])
        here = here[part] if isinstance(part, int) else here.get(part)
    return made


def _path(key: str) -> KeyPath:
    """`data.blend[0].weight` in its parts; empty where that is no key."""
    path: list[str | int] = []
    for word in key.split("."):
        parts = re.fullmatch(r"([^\[\]]+)((?:\[\d+\])*)", word)
        if parts is None:
            return ()
        path += [parts[1], *map(int, re.findall(r"\d+", parts[2]))]
    return tuple(path)


def _impossible(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """What YAML can say and a configuration cannot be."""
    if isinstance(data, dict):
        for key, value in data.items():
            if isinstance(key, str):
                yield from _impossible(value, (*path, key))
            else:
                yield (*path, str(key)), f"a key must be text, and this is a {type(key).__name__}: put it in quotes"
    elif isinstance(data, list):
        for place, value in enumerate(data):
            yield from _impossible(value, (*path, place))
    elif isinstance(data, float) and not math.isfinite(data):
        yield path, f"{data} is not a number that can be used"


def _where(whole: str, sources: dict[KeyPath, str], path: KeyPath) -> str:
    """Where a person has to look: the override that a key, or the section it is in, came from, else `whole`."""
    key = key_of(path)
    for length in range(len(path), 0, -1):
        if text := sources.get(path[:length]):
            return text if text.partition("=")[0].rpartition(" ")[2].strip() == key else f"{text}: {key}"
    return ": ".join(filter(None, [whole, key]))


def _line(where: str, told: str) -> str:
    return " ".join(f"{where}: {told}".split("\n"))
