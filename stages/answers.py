"""Held-out conversations whose last answer a model gives, and how many it gives exactly.

The question is all that precedes the last answer, header included; the model goes on with the likeliest token each time. An
answer is right when it is the one of the data token by token, its end included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_core_impl.data.chat_template import ASSISTANT
from megatron_core_impl.data.instruction_dataset import Conversations, Reading, split_conversations
from stages.contracts import artifacts as a

LONGEST = 64  # tokens of an answer that is asked for: longer ones are essays, not right or wrong


class Question(NamedTuple):
    """What a model reads, and what it should say."""

    prompt: list[int]
    answer: list[int]


def held_out(dataset: a.DatasetArtifact, folder: Path, *, split: str, seed: int, count: int) -> list[Question]:
    """The first held-out conversations that end with an answer of at most `LONGEST` tokens.

    Args:
        folder: of the dataset.
        split, seed: of the training, which decide what was held out of sets that are for all.
    """
    found: list[Question] = []
    for each in dataset.sets:
        if each.role not in ("all", "valid"):
            continue
        conversations = Conversations(folder / each.name, Reading(sequence_length=2**31))
        numbers = range(len(conversations))
        chosen: Sequence[int] = numbers
        if each.role == "all":
            chosen = split_conversations(len(conversations), split, seed)[1].tolist()
        for number in chosen:
            if len(found) == count:
                return found
            question = _question(conversations.tokens(number), conversations.roles(number), dataset.header_tokens)
            if question is not None:
                found.append(question)
    return found


def _question(ids: Any, roles: Any, header_tokens: int) -> Question | None:
    """The last answer of a conversation and what precedes it."""
    start = len(roles)
    while start and roles[start - 1] == ASSISTANT:
        start -= 1
    start += header_tokens
    if not 0 < start < len(roles) or len(roles) - start > LONGEST:
        return None
    return Question(ids[:start].tolist(), ids[start:].tolist())


@torch.no_grad()
def answers(model: Any, questions: Sequence[Question]) -> list[list[int]]:
    """What a model of transformers says to each question: at most as many tokens as the right answer has."""
    said = []
    for prompt, answer in questions:
        tokens = torch.tensor([prompt], device=model.device)
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=len(answer), pad_token_id=0
        )
        said.append(written[0, len(prompt) :].tolist())
    return said


def exact(said: Sequence[list[int]], questions: Sequence[Question]) -> float:
    """The share of right answers."""
    return sum(given == question.answer for given, question in zip(said, questions, strict=True)) / max(1, len(questions))
