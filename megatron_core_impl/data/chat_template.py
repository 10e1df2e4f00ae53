"""Conversations as text: where each message's text lies in what a model is to read, and whose it is.

A template is what a model's tokenizer brings along (Jinja, rendered as transformers does), or one of two that are known here:

- `chatml`: `<|im_start|>{role}\\n{text}<|im_end|>\\n`, roles system, user, assistant and tool;
- `megatron-llm`: the same marks with Megatron-LLM's roles system, question and answer, each message a text of its own for the
  tokenizer, and the header of an answer a part of it. Tokens are those of its `preprocess_instruct_data.py`.

Whose a token is: a template says so by `{% generation %}`, or else by rendering the beginning of a conversation as the
beginning of the whole one. What it writes for an answer goes from the prompt for it (`add_generation_prompt`) to where the next
message begins.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from megatron_core_impl.data.conversations import Message
from megatron_core_impl.data.jinja_templates import GENERATION, Refused, marks_answers, parse
from megatron_core_impl.data.marks import CONTROL, FIRST_NUMBER, Marks
from megatron_core_impl.data.records import MalformedRecord
from megatron_core_impl.data.tokenizer import Tokenizer, read_json_object

TemplateName = Literal["tokenizer", "chatml", "megatron-llm"]

SYSTEM, PROMPTER, ASSISTANT = 0, 1, 2  # as in Megatron-LLM's role streams

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
        self._template = parse(source)
        self._marks_answers = marks_answers(source)
        self._named_tokens = named_tokens
        self._marks = marks
        self._probe()

    def render(self, messages: Sequence[Message]) -> list[list[Region]]:
        """See `ChatTemplate`. A system message without text is left out."""
        numbers = [number for number, message in enumerate(messages) if message.role != "system" or message.text]
        said = [messages[number] for number in numbers]
        chat = [{"role": message.role, "content": self._marks.protect(message.text)} for message in said]
        conversation = _Conversation(said, numbers, chat, self._text(chat))
        answers = self._marked_answers(conversation) if self._marks_answers else self._prefix_answers(conversation)
        cuts = list[tuple[int, int, range]]()  # end, role, messages whose text lies before it
        first = 0
        if said and said[0].role == "system" and (end := self._end_of(conversation, 0)) is not None:
            cuts.append((end, SYSTEM, range(1)))
            first = 1
        for answer in answers:
            cuts.append((answer.start, PROMPTER, range(first, answer.message)))
            cuts.append((answer.end, ASSISTANT, range(answer.message, answer.message + 1)))
            first = answer.message + 1
        cuts.append((len(conversation.whole), PROMPTER, range(first, len(said))))
        regions, begin = [], 0
        for last, role, behind in cuts:
            for end, weight in self._weighed(conversation, begin, last, behind):
                if end > begin:
                    text = GENERATION.sub("", conversation.whole[begin:end])
                    regions.append(Region(self._marks.resolve(text), role, weight))
                    begin = end
        return [regions]

    def _text(self, chat: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._named_tokens
            )
        except Refused as error:
            raise MalformedRecord(f"the chat template refuses it: {error}") from None
        except Exception as error:  # a template is a program: it may fail at anything that a record says
            raise MalformedRecord(f"the chat template fails: {type(error).__name__}: {error}") from None

    def _try_text(self, chat: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str | None:
        try:
            return self._text(chat, add_generation_prompt=add_generation_prompt)
        except MalformedRecord:
            return None

    def _end_of(self, conversation: "_Conversation", message: int) -> int | None:
        """Where in the text a message ends, if all up to it is rendered as the beginning of the whole, and it lies in there.

        A template may put the text of the system into the first question: then what is rendered of the system alone does not
        depend on its text.
        """
        before, last = conversation.chat[:message], conversation.chat[message]
        start = self._try_text([*before, last])
        other = self._try_text([*before, {**last, "content": last["content"] + "x"}])
        return len(start) if start is not None and start != other and conversation.whole.startswith(start) else None

    def _weighed(self, conversation: "_Conversation", begin: int, end: int, behind: range) -> list[tuple[int, float]]:
        """Where the stretches of one weight end within a region, and the weights."""
        weights = [conversation.weight(message) for message in behind] or [1.0]
        stretches = list[tuple[int, float]]()
        for message, (weight, following) in zip(behind, pairwise(weights), strict=False):
            if weight == following:
                continue
            place = self._end_of(conversation, message)
            if place is None or not begin < place <= end:
                first, last = (conversation.numbers[i] + 1 for i in (behind[0], behind[-1]))
                raise MalformedRecord(
                    f"messages {first} to {last} have different weights, but the chat template does not tell where one ends "
                    "and the next begins"
                )
            stretches.append((place, weight))
            begin = place
        return [*stretches, (end, weights[-1])]

    def _marked_answers(self, conversation: "_Conversation") -> list["_Answer"]:
        """What stands between the marks of {% generation %}."""
        marks = list(GENERATION.finditer(conversation.whole))
        places = [(begin.start(), end.end()) for begin, end in zip(marks[::2], marks[1::2], strict=True)]
        if len(places) != len(conversation.answers):
            raise MalformedRecord(
                f"the chat template marks {len(places)} answers by {{% generation %}}, but the conversation has "
                f"{len(conversation.answers)}"
            )
        return [_Answer(message, *place) for message, place in zip(conversation.answers, places, strict=True)]

    def _prefix_answers(self, conversation: "_Conversation") -> list["_Answer"]:
        """Each answer, by rendering the conversation up to it, and up to its end."""
        answers, chat, whole = [], conversation.chat, conversation.whole
        for message in conversation.answers:
            prompt = self._text(chat[:message], add_generation_prompt=True)
            if not whole.startswith(prompt):  # it may prompt for more than an answer has in it
                prompt = self._text(chat[:message])
            end = whole if message == len(chat) - 1 else self._text(chat[: message + 1])
            if not (whole.startswith(prompt) and whole.startswith(end) and len(prompt) < len(end)):
                raise MalformedRecord(
                    f"message {conversation.numbers[message] + 1}: the chat template does not render the beginning of a "
                    "conversation as the beginning of the whole, and has no {% generation %}, so where the answer is cannot be "
                    "known"
                )
            answers.append(_Answer(message, len(prompt), len(end)))
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
        if not self._marks_answers and (header := self._header_behind_answers()):
            raise ValueError(
                "the chat template cannot be used for training: it ends a conversation with the header of a further answer, "
                f"{header!r}, which a model would learn to write. Let it do so only {{% if add_generation_prompt %}}"
            )

    def _header_behind_answers(self) -> str:
        """What the template writes behind the last answer of a conversation only, where that prompts for another answer."""
        chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        behind = self._text(chat).rpartition(ANSWER)[2]
        longer = self._try_text([*chat, {"role": "user", "content": QUESTION}])
        prompt = self._try_text(chat[:1], add_generation_prompt=True)
        if longer is None or prompt is None or ANSWER not in longer:
            return ""
        pairs = zip(behind, longer.rpartition(ANSWER)[2], strict=False)
        extra = behind[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
        # Others end a conversation as a whole, say by the end of text, and are right to.
        return behind.strip() if extra and prompt.endswith(extra) else ""


class _Answer(NamedTuple):
    """Where an answer is."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class _Conversation:
    """A conversation while it is cut into regions. Its messages are counted from 0."""

    said: Sequence[Message]
    numbers: Sequence[int]  # of each in the record
    chat: Sequence[Mapping[str, str]]  # as the template sees them
    whole: str  # what it makes of them

    @property
    def answers(self) -> list[int]:
        """Which of the messages are the assistant's."""
        return [number for number, message in enumerate(self.said) if message.role == "assistant"]

    def weight(self, message: int) -> float:
        """What a message counts."""
        weight = self.said[message].weight
        return 1.0 if weight is None else weight


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
