"""Conversations as text: where each message's text lies in what a model is to read, and whose it is.

A template is what a model's tokenizer brings along (Jinja, rendered as transformers does), or one of two that are known here:

- `chatml`: `<|im_start|>{role}\\n{text}<|im_end|>\\n`, roles system, user, assistant and tool;
- `megatron-llm`: the same marks with Megatron-LLM's roles system, question and answer, each message a text of its own for the
  tokenizer, and the header of an answer a part of it. Tokens are those of its `preprocess_instruct_data.py`.

Text that spells a control token (`</s>`, `<|im_end|>`) is text, while the same letters written by the template are the token.
So that rendering cannot mix them up, they are two noncharacters of Unicode apart: in messages a control token's letters are
replaced by a mark before rendering and put back afterwards (`PROTECTED`), and those left over, the template's, become another
mark (`CONTROL`), which `control_tokens` turns into ids.

Whose a token is: a template says so by `{% generation %}`, or else by rendering the beginning of a conversation as the
beginning of the whole one. What it writes for an answer goes from the prompt for it (`add_generation_prompt`) to where the next
message begins.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from megatron_core_impl.data.conversations import Message
from megatron_core_impl.data.records import MalformedRecord
from megatron_core_impl.data.tokenizer import Tokenizer, read_json_object

TemplateName = Literal["tokenizer", "chatml", "megatron-llm"]

SYSTEM, PROMPTER, ASSISTANT = 0, 1, 2  # as in Megatron-LLM's role streams

CONTROL, PROTECTED = "\U0010fffe", "\U0010ffff"  # noncharacters, each followed by the number of a control token
FIRST_NUMBER = 0x100000  # as a character
GENERATION = re.compile(f"{PROTECTED}([\\[\\]])")  # begin and end of what {% generation %} encloses

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFERENCE_ROLES = {"system": "system", "user": "question", "assistant": "answer"}
QUESTION, ANSWER = "What is seven?", "It is a number."  # the smallest conversation, that templates are tried with
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Region(NamedTuple):
    """A stretch of a conversation's text."""

    text: str  # control tokens as marks
    role: int
    weight: float  # of its message


class ChatTemplate(Protocol):
    """Makes text of messages."""

    def render(self, messages: Sequence[Message]) -> list[list[Region]]:
        """Texts for the tokenizer, each whole one by itself, in regions.

        Raises:
            MalformedRecord: the template cannot express this conversation; with the reason.
        """


class Marks:
    """Tells control tokens from text that spells them.

    Args:
        tokens: the control tokens; their order gives each its number.
        parse_special: let the letters of a control token in a message be the token, as Megatron-LLM does.
    """

    def __init__(self, tokens: Sequence[str], *, parse_special: bool = False) -> None:
        self.tokens = tokens
        self.parse_special = parse_special
        self._numbers = {token: number for number, token in enumerate(tokens)}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._protected, self._resolved = (
            re.compile(f"{mark}([{chr(FIRST_NUMBER)}-{chr(FIRST_NUMBER + 0xFFFD)}])") for mark in (PROTECTED, CONTROL)
        )

    def protect(self, text: str) -> str:
        """A message's text, in which no control token is spelled any more.

        Raises:
            MalformedRecord: it holds what is used as a mark.
        """
        if CONTROL in text or PROTECTED in text:
            raise MalformedRecord("a text holds U+10FFFE or U+10FFFF, which are no characters")
        if self.parse_special:
            return text
        return self._spelled.sub(lambda match: PROTECTED + chr(FIRST_NUMBER + self._numbers[match[0]]), text)

    def spell(self, resolved: str) -> str:
        """Text as `resolve` made it, its control tokens written out."""
        return self._resolved.sub(lambda match: self.tokens[ord(match[1]) - FIRST_NUMBER], resolved)

    def resolve(self, rendered: str) -> str:
        """Rendered text as the tokenizer takes it: control tokens as marks, the letters of messages as they were."""
        marked = self._spelled.sub(lambda match: CONTROL + chr(FIRST_NUMBER + self._numbers[match[0]]), rendered)
        return self._protected.sub(lambda match: self.tokens[ord(match[1]) - FIRST_NUMBER], marked)


class ReferenceTemplate:
    """Megatron-LLM's: every message a text of its own, header and end included."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self.header = Region(marks.resolve(f"{IM_START}{REFERENCE_ROLES['assistant']}\n"), ASSISTANT, 1.0)  # of an answer

    def render(self, messages: Sequence[Message]) -> list[list[Region]]:
        """See `ChatTemplate`."""
        texts = []
        for number, message in enumerate(messages, 1):
            if message.role not in REFERENCE_ROLES:
                raise MalformedRecord(f"message {number}: the megatron-llm template has no role {message.role}")
            role = (SYSTEM, PROMPTER, ASSISTANT)[list(REFERENCE_ROLES).index(message.role)]
            text = f"{IM_START}{REFERENCE_ROLES[message.role]}\n{self._marks.protect(message.text)}{IM_END}\n"
            texts.append([Region(self._marks.resolve(text), role, 1.0 if message.weight is None else message.weight)])
        return texts


class JinjaTemplate:
    """A template in Jinja. It sees `messages`, `add_generation_prompt` and the tokenizer's named tokens.

    Args:
        source: the template.
        named_tokens: `bos_token` and the like, as text.

    Raises:
        ValueError: it is no template, or cannot render a question and its answer so that the answer is known in it.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], marks: Marks) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from None
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._named_tokens = named_tokens
        self._marks = marks
        self._probe()

    def render(self, messages: Sequence[Message]) -> list[list[Region]]:
        """See `ChatTemplate`. A system message without text is left out."""
        said = [message for message in messages if message.role != "system" or message.text]
        chat = [{"role": message.role, "content": self._marks.protect(message.text)} for message in said]
        whole = self._text(chat)
        answers = self._marked_answers(whole) if self._marks_answers else self._prefix_answers(chat, whole)
        numbers = [number for number, message in enumerate(said) if message.role == "assistant"]
        if len(answers) != len(numbers):
            raise MalformedRecord(
                f"the chat template marks {len(answers)} answers by {{% generation %}}, but the conversation has {len(numbers)}"
            )
        end_of_system = 0
        if said[0].role == "system":
            start = self._try_text(chat[:1])
            end_of_system = len(start) if start is not None and whole.startswith(start) else 0
        cuts = list[tuple[int, int, Sequence[int]]]()  # end, role, messages whose text lies before it
        first = 0
        for (start_of_answer, end_of_answer), number in zip(answers, numbers, strict=True):
            if 0 < end_of_system <= start_of_answer and not cuts:
                cuts.append((end_of_system, SYSTEM, [0]))
                first = 1
            cuts.append((start_of_answer, PROMPTER, range(first, number)))
            cuts.append((end_of_answer, ASSISTANT, [number]))
            first = number + 1
        cuts.append((len(whole), PROMPTER, range(first, len(said))))
        regions, begin = [], 0
        for end, role, behind in cuts:
            if end > begin:
                text = GENERATION.sub("", whole[begin:end])
                regions.append(Region(self._marks.resolve(text), role, _common_weight(said, behind)))
            begin = end
        return [regions]

    def _text(self, chat: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._named_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise MalformedRecord(f"the chat template refuses it: {error}") from None

    def _try_text(self, chat: Sequence[Mapping[str, str]]) -> str | None:
        try:
            return self._text(chat)
        except MalformedRecord:
            return None

    def _marked_answers(self, whole: str) -> list[tuple[int, int]]:
        """Begin and end of what stands between the marks of {% generation %}."""
        marks = list(GENERATION.finditer(whole))
        return [(begin.start(), end.end()) for begin, end in zip(marks[::2], marks[1::2], strict=True)]

    def _prefix_answers(self, chat: Sequence[Mapping[str, str]], whole: str) -> list[tuple[int, int]]:
        """Begin and end of each answer, by rendering the conversation up to it, and up to its end."""
        answers = []
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            prompt = self._text(chat[:number], add_generation_prompt=True)
            if not whole.startswith(prompt):  # it may prompt for more than an answer has in it
                prompt = self._text(chat[:number])
            end = whole if number == len(chat) - 1 else self._text(chat[: number + 1])
            if not (whole.startswith(prompt) and whole.startswith(end) and len(prompt) < len(end)):
                raise MalformedRecord(
                    f"message {number + 1}: the chat template does not render the beginning of a conversation as the beginning "
                    "of the whole, and has no {% generation %}, so where the answer is cannot be known"
                )
            answers.append((len(prompt), len(end)))
        return answers

    def _probe(self) -> None:
        """Try the smallest conversation, so that a template of no use is refused at once and not once per record."""
        try:
            learnt = _learnt(self)
        except MalformedRecord as error:
            raise ValueError(f"the chat template cannot be used for training: {error}") from None
        if ANSWER not in learnt or QUESTION in learnt:
            raise ValueError(
                f"the chat template cannot be used for training: of the question {QUESTION!r} and the answer {ANSWER!r} it "
                f"takes {self._marks.spell(learnt)!r} for the answer"
            )


def load_template(name: TemplateName, folder: Path, marks: Marks, tokenizer: Tokenizer) -> ChatTemplate:
    """A template by name.

    Args:
        folder: of the tokenizer; `tokenizer` reads its template there, and what it calls its named tokens.
        marks: of the tokenizer's control tokens.

    Raises:
        ValueError: the folder has no template, the template is of no use for training, or the tokenizer lacks its tokens.
    """
    if name == "tokenizer":
        settings = _read_settings(folder)
        return JinjaTemplate(_source(folder, settings), {**tokenizer.named_tokens, **_named_tokens(settings)}, marks)
    if missing := [token for token in (IM_START, IM_END) if token not in marks.tokens]:
        is_known = all(tokenizer.id_of(token) is not None for token in missing)
        raise ValueError(
            f"the chat template {name} needs the special token {' and '.join(missing)}, which the tokenizer of {folder} "
            + ("has, but not as special: any text that spells it becomes it" if is_known else "does not have")
            + f'. Set model.added_tokens: ["{IM_START}", "{IM_END}"]'
            + (", which makes it special and keeps its id" if is_known else "")
        )
    return ReferenceTemplate(marks) if name == "megatron-llm" else JinjaTemplate(CHATML, {}, marks)


def end_of_answer(template: ChatTemplate) -> int | None:
    """The number of the control token that a template writes last for an answer, behind its text; None: there is none."""
    marks = re.findall(f"{CONTROL}(.)", _learnt(template).rpartition(ANSWER)[2], re.DOTALL)
    return ord(marks[-1]) - FIRST_NUMBER if marks else None


def _learnt(template: ChatTemplate) -> str:
    """What a template makes of the answer to a question."""
    texts = template.render([Message("user", QUESTION), Message("assistant", ANSWER)])
    return "".join(region.text for regions in texts for region in regions if region.role == ASSISTANT)


def _source(folder: Path, settings: Mapping[str, Any]) -> str:
    """The Jinja of a tokenizer: a file of its own, or in `tokenizer_config.json`, where there may be several by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"{folder}: the tokenizer has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json). "
            'Set preprocess.chat_template to "chatml" or "megatron-llm", or put a template there'
        )
    return found


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        settings |= read_json_object(folder / name)
    return settings


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in NAMED_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _common_weight(messages: Sequence[Message], numbers: Sequence[int]) -> float:
    """The weight of messages that lie in one region."""
    weights = {1.0 if messages[number].weight is None else messages[number].weight for number in numbers}
    if len(weights) > 1:
        raise MalformedRecord(
            f"messages {numbers[0] + 1} to {numbers[-1] + 1} have different weights, but the chat template does not tell where "
            "one ends and the next begins"
        )
    return weights.pop() or 0.0 if weights else 1.0


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
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers: Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
