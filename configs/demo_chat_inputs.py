"""Make what `configs/demo-chat.yaml` starts from, on a machine without internet.

    python configs/demo_chat_inputs.py [workspace/demo-chat]

- `train.jsonl`, `valid.jsonl`: conversations of one to three questions, in OpenAI's form, about numbers and words. No question
  occurs twice, so that none of the held-out ones was seen in training;
- `base`: the base model, a small random Llama 2 and a SentencePiece tokenizer that knows nothing of chat.

What is there already is kept.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from demo_inputs import make_model, train_tokenizer

QUESTIONS, HELD_OUT = 8000, 200
VOCAB_SIZE = 384
SYSTEM = "Answer in one word."
WORDS = [
    "cat",
    "dog",
    "sun",
    "tree",
    "river",
    "stone",
    "cloud",
    "bread",
    "house",
    "garden",
    "winter",
    "summer",
    "lamp",
    "chair",
    "road",
    "horse",
    "apple",
    "music",
    "paper",
    "glass",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("workspace/demo-chat"), help="where to put them")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "base" / "config.json").exists():
        return
    started = time.monotonic()
    choice = random.Random(1234)
    questions = unique_questions(choice)
    write_conversations(folder / "valid.jsonl", questions[:HELD_OUT], choice)
    write_conversations(folder / "train.jsonl", questions[HELD_OUT:], choice)
    partial = folder / "base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    lines = (f"{question} {answer}\n" for question, answer in questions)
    train_tokenizer(lines, partial / "tokenizer.model", VOCAB_SIZE)
    parameters = make_model(partial, hidden_size=128, intermediate_size=344, num_attention_heads=4, num_key_value_heads=2)
    partial.rename(folder / "base")
    seconds = time.monotonic() - started
    print(f"{QUESTIONS:,} questions and a base model of {parameters:,} parameters, made in {seconds:.0f}s: {folder}")


def unique_questions(choice: random.Random) -> list[tuple[str, str]]:
    """Questions with their answers, each question once."""
    found: dict[str, str] = {}
    for question, answer in _questions(choice):
        found[question] = answer
        if len(found) == QUESTIONS:
            break
    return list(found.items())


def _questions(choice: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        one, other = choice.sample(range(10, 100), 2)
        yield f"Which is larger, {one} or {other}?", str(max(one, other))
        number = choice.randrange(10, 999)
        yield f"What comes after {number}?", str(number + 1)
        words = choice.sample(WORDS, 4)
        yield f"What is the last of {', '.join(words)}?", words[-1]


def write_conversations(file: Path, questions: list[tuple[str, str]], choice: random.Random) -> None:
    """One conversation a line, of one to three questions."""
    left = iter(questions)
    with file.open("w") as lines:
        while turns := [turn for turn, _ in zip(left, range(choice.randint(1, 3)), strict=False)]:
            messages = [{"role": "system", "content": SYSTEM}]
            for question, answer in turns:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
