"""What is wrong with a value of the configuration, in a person's words: the value, what is legal, what was meant."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic_core import ErrorDetails

from stages.contracts.config import PipelineConfig
from stages.contracts.settings import Frozen

# How other programs call what we have, where the words alone are not close: a key of ours, or any key with this last word.
ELSEWHERE = {
    "model.name": "model.source",
    "model.path": "model.source",
    "name_or_path": "model.source",
    "model_name_or_path": "model.source",
    "push.name": "push.repo",
    "learning_rate": "train.lr",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "seq_length": "train.sequence_length",
    "max_seq_length": "train.sequence_length",
    "max_grad_norm": "train.clip_grad",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "lr_scheduler_type": "train.schedule",
    "tensor_model_parallel_size": "layout.tp",
    "pipeline_model_parallel_size": "layout.pp",
}
LONGEST = 1e15  # of a number that is repeated
MOST_LISTED, FEW = 16, 6  # keys in one line; of more, so many are shown
EXAMPLE = "configs/llama2-7b.yaml"  # whose comments explain keys

KeyPath = tuple[str | int, ...]  # of a value: keys, and places in lists


def key_of(path: KeyPath) -> str:
    """A path as people write it: `data.blend[1].weight`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def explain(problem: ErrorDetails) -> str:
    """A pydantic error in a person's words: the value, and what is legal instead."""
    loc = problem["loc"]
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    got = json.dumps(value, ensure_ascii=False, default=str)
    got = got if len(got) <= 60 else got[:57] + "…"
    section, field = _find(loc)
    refused = "it is empty" if value is None else f"{got} is not legal"
    if kind == "extra_forbidden":
        return f"unknown key. {_suggest(loc)}"
    if kind == "missing":
        return f"missing. {_about(section, field)}"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", str(context["expected"])) or [str(context["expected"])]
        return f"{refused}. Legal here: {', '.join(legal)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        keys = _listed(list(section.model_fields)) if section is not None else ""
        return f"{'it is empty' if value is None else f'{got} is no section'}. It must have keys of: {keys}"
    needs = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text (in quotes, where it looks like a number)",
        "tuple_type": "a list",
        "string_too_short": "text that is not empty",
        "too_short": "a list that is not empty",
        "greater_than": f"greater than {context.get('gt', 0):,.12g}",
        "greater_than_equal": f"at least {context.get('ge', 0):,.12g}",
        "less_than": f"less than {context.get('lt', 0):,.12g}",
        "less_than_equal": f"at most {context.get('le', 0):,.12g}",
    }.get(kind)
    if needs is None:
        return f"{refused}. {_about(section, field)}"
    if value is None:
        return f"it is empty, and must be {needs}: write a value, or leave it out"
    if needs == "a whole number" and isinstance(value, float) and value.is_integer() and abs(value) < LONGEST:
        return f"{got} must be a whole number, written without point or exponent: {int(value)}"
    return f"{got} must be {needs}"


def _find(loc: KeyPath) -> tuple[type[Frozen] | None, str]:
    """The class of a section, or that of the section a field is in, and the field's name."""
    section: type[Frozen] | None = PipelineConfig
    name = ""
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section is not None and not name else None
        inner = _section(field.annotation) if field is not None else None
        if inner is None:
            name = name or part
        else:
            section = inner
    return section, name


def _section(annotation: object) -> type[Frozen] | None:
    """The class of a section, or of the sections in a list."""
    for inner in (annotation, *get_args(annotation)):
        if isinstance(inner, type) and issubclass(inner, Frozen):
            return inner
    return None


def _about(section: type[Frozen] | None, field: str) -> str:
    if section is None or field not in section.model_fields:
        return "It is needed; it has the keys " + _listed(list(section.model_fields)) if section is not None else ""
    return f"{field} is: {section.model_fields[field].description}"


def _suggest(loc: KeyPath) -> str:
    """What was probably meant by a key that does not exist."""
    section, _ = _find(loc[:-1])
    siblings = list(section.model_fields) if section is not None else []
    unknown = str(loc[-1])
    if meant := ELSEWHERE.get(key_of(loc)) or ELSEWHERE.get(unknown):
        return f"Did you mean {meant}?"
    if close := difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6):
        return f"Did you mean {key_of((*loc[:-1], close[0]))}?"
    everywhere = {name: f"{part}.{name}" for part, names in _sections() for name in names}
    if close := difflib.get_close_matches(unknown, everywhere, n=1, cutoff=0.8):
        return f"Did you mean {everywhere[close[0]]}?"
    return f"Legal here: {_listed(siblings, near=unknown)}"


def _listed(names: Sequence[str], near: str | None = None) -> str:
    """Names in a line; where there are many, the first of them or those that are nearest to another."""
    if len(names) <= MOST_LISTED:
        return ", ".join(names)
    shown = names[:FEW] if near is None else difflib.get_close_matches(near, names, n=FEW, cutoff=0.0)
    return f"{', '.join(shown)}, and {len(names) - FEW} more; see {EXAMPLE}"


def _sections() -> Iterator[tuple[str, list[str]]]:
    for part, field in PipelineConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen):
            yield part, list(field.annotation.model_fields)
