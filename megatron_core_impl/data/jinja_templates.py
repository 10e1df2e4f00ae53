"""Chat templates as transformers reads them: its Jinja, with `{% generation %}`, `raise_exception` and its `tojson`.

One thing differs: what a template makes of a conversation never depends on the day. A template that asks whether there is a
`strftime_now` is told that there is none, and writes the day it has for that case. To one that does not ask it is always `DAY`.
"""

import json
import re
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from megatron_core_impl.data.marks import PROTECTED

GENERATION = re.compile(f"{PROTECTED}([\\[\\]])")  # begin and end of what {% generation %} encloses
DAY = date(2024, 7, 26)  # the one in the templates of Llama 3.2


class Refused(jinja2.TemplateError):
    """What `raise_exception` raises: the template does not take this conversation."""


def parse(source: str) -> jinja2.Template:
    """A template.

    Raises:
        ValueError: it is no Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    if not re.search(r"\bstrftime_now\s+is\s+(not\s+)?defined\b", source):
        environment.globals["strftime_now"] = DAY.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from None


def marks_answers(source: str) -> bool:
    """Whether a template says itself what the answers are."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: leaves a mark before and after what it encloses."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(bracket: str) -> jinja2.nodes.Node:
            return jinja2.nodes.Output([jinja2.nodes.TemplateData(PROTECTED + bracket)]).set_lineno(line)

        return [mark("["), jinja2.nodes.Scope(body).set_lineno(line), mark("]")]


def _refuse(message: str) -> None:
    raise Refused(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers: Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
