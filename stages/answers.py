"""Held-out conversations whose last answer a model gives, and how many it gives exactly.

The question is all that precedes the last answer, header included; the model goes on with the likeliest token each time, until
it ends its answer. An answer is right when it is the one of the data token by token, its end included.
"""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_core_impl.data.chat_template import ASSISTANT
from megatron_core_impl.data.instruction_dataset import Conversations, Reading, split_conversations
from stages import both_models
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.figures import percent
from stages.contracts.specs import ExportSpec
from stages.gate_report import write_json

ANSWERS = "answers.json"


class Question(NamedTuple):
    """What a model reads, and what it should say."""

    prompt: list[int]
    answer: list[int]


def held_out(
    dataset: a.DatasetArtifact, folder: Path, *, split: str, seed: int, count: int, longest: int, context: int
) -> list[Question]:
    """The first held-out conversations that end with a short answer: longer ones are essays, not right or wrong.

    Args:
        folder: of the dataset.
        split, seed: of the training, which decide what was held out of sets that are for all.
        longest: tokens of an answer.
        context: tokens of a question and its answer.
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
            question = _question(
                conversations.tokens(number), conversations.roles(number), dataset.header_tokens, dataset.end_of_answer
            )
            if question is not None and len(question.answer) <= longest and len(question.prompt) + longest <= context:
                found.append(question)
    return found


def _question(ids: Any, roles: Any, header_tokens: int, end: int | None) -> Question | None:
    """The last answer of a conversation, up to the token that ends it, and what precedes it."""
    is_answer = np.equal(roles, ASSISTANT)
    if not is_answer.any():
        return None
    stop = len(roles) - int(np.argmax(is_answer[::-1]))
    start = stop
    while start and is_answer[start - 1]:
        start -= 1
    start += header_tokens
    if not 0 < start < stop:
        return None
    if end is not None and end not in ids[start:stop] and stop < len(ids) and ids[stop] == end:
        stop += 1  # the template has the end outside of what it calls the answer
    answer = ids[start:stop].tolist()
    if end in answer:
        answer = answer[: answer.index(end) + 1]
    return Question(ids[:start].tolist(), answer)


def ask(
    ctx: Context, spec: ExportSpec, dataset: a.DatasetArtifact, data: Path, checkpoint: a.CheckpointArtifact,
    models: Mapping[str, Path],
) -> dict[str, Any]:  # fmt: skip
    """Let models answer held-out questions: {"questions": n, <name of a model>: share of right ones}, or nothing.

    All get a row of the vocabulary for each added token. Questions and answers stand in answers.json.

    Args:
        data: folder of the dataset.
        models: Hugging Face folders by name; the last one's tokenizer is that of the data.
    """
    wanted, longest = spec.settings.answers, spec.settings.max_new_tokens
    if not wanted:
        return {}
    trained = checkpoint.spec["settings"]  # which of the data were held out
    questions = held_out(
        dataset, data, split=trained["split"], seed=trained["seed"], count=wanted, longest=longest,
        context=checkpoint.model.max_position_embeddings,
    )  # fmt: skip
    if not questions:  # it is a figure for people: not worth a run that has been trained
        ctx.warn(
            f"export.answers={wanted}: no held-out conversation ends with an answer of at most {longest} tokens "
            "(export.max_new_tokens), so nothing is asked"
        )
        return {}
    said = {}
    for when, folder in models.items():
        ctx.log(f"asking the model {when} training {len(questions):,} questions")
        facts = checkpoint.model
        model = both_models.load_transformers(
            folder, spec.verify.precision, vocab_size=facts.vocab_size, new_rows=facts.new_rows or "mean"
        ).module
        said[when] = answers(model, questions, longest=longest)
        del model
        gc.collect()
    tokenizer = both_models.quiet_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [
        {
            "question": tokenizer.decode(question.prompt),
            "answer": tokenizer.decode(question.answer),
            **{when: tokenizer.decode(ids[number]) for when, ids in said.items()},
        }
        for number, question in enumerate(questions)
    ]
    write_json(ctx.scratch / ANSWERS, texts)
    return {"questions": len(questions), **{when: exact(ids, questions) for when, ids in said.items()}}


def told(right: Mapping[str, Any]) -> str:
    """How many answers were right, for the figure of the stage."""
    if not right:
        return ""
    shares = f"{percent(right['before'])} → {percent(right['after'])}"
    return f" · right answers to {right['questions']:,} held-out questions {shares}"


@torch.no_grad()
def answers(model: Any, questions: Sequence[Question], *, longest: int) -> list[list[int]]:
    """What a model of transformers says to each question, until it stops by its generation settings, or at `longest` tokens."""
    said = []
    for prompt, _ in questions:
        tokens = torch.tensor([prompt], device=model.device)
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=longest, pad_token_id=0
        )
        said.append(written[0, len(prompt) :].tolist())
    return said


def exact(said: Sequence[list[int]], questions: Sequence[Question]) -> float:
    """The share of right answers."""
    return sum(given[: len(question.answer)] == question.answer for given, question in zip(said, questions, strict=True)) / max(
        1, len(questions)
    )
