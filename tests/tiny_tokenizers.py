"""Tokenizers of a few hundred pieces, trained on the spot, for the tests of data."""

import io
import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CODE = [
    "def add(a, b):\n    return a + b\n",
    "class Queue:\n    def __init__(self) -> None:\n        self.items: list[int] = []\n",
    "for number in range(10):\n    print(number, number ** 2)\n",
    "import sys\n\nif __name__ == '__main__':\n    sys.exit(main())\n",
]


AWKWARD = [
    "", " ", "\n", "a", "</s>", "<s>hello</s>", "x</s></s>y", "<unk>", "  two", "trailing  ", "tabs\t\r\nCRLF\r",
    "héllo", "你好", "😀👩\u200d🚀", "\x00nul", "\ufeffbom", "\u2028", "<0x0A><0x41>", "<|im_start|>user", *CODE,
]  # fmt: skip


def train_sentencepiece(folder: Path, vocab_size: int = 320) -> None:
    """Write `tokenizer.model`: BPE with byte fallback, <unk> 0, <s> 1, </s> 2, as Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=3,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def train_huggingface(folder: Path, vocab_size: int = 300) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: byte-level BPE with all that a saved tokenizer may bring along.

    That is a template that adds <s>, truncation, padding, and an added token behind the vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CODE, trainer)
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


def fuzz(count: int, seed: int = 0) -> list[str]:
    """Texts of what tokenizers trip over: words, runs of spaces, all kinds of line ends, controls, all of Unicode."""
    rng = random.Random(seed)
    words = ["self", "return", "Foo", "été", "naïve", "x", "İ", "ﬁ", "한국", "你好", "👩\u200d🚀", "<s>", "</s>", "<0x0A>"]
    breaks = ["\n", "\r\n", "\r", "\t", "\n\n\n", "\x00", "\x7f", "\x85", "\u2028", "\u00a0", "\u3000", "\ufeff"]
    kinds = [
        lambda: rng.choice(words),
        lambda: " " * rng.choice([1, 1, 1, 2, 3, 4, 7, 8, 16, 17, 40]),
        lambda: rng.choice(breaks),
        lambda: "".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", k=rng.randint(1, 4))),
        lambda: str(rng.randint(0, 10**6)),
        lambda: chr(rng.choice([rng.randint(0, 0x2FF), rng.randint(0x300, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])),
        lambda: rng.choice(["▁", "▁▁", "a▁", "ɪ", "’s", "“", "—", "…"]) if rng.random() < 0.1 else "a",
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randint(0, 30))) for _ in range(count)]


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def sentencepiece_model(**settings: object) -> bytes:
    """A model that is trained, with other settings, on the same text."""
    model = io.BytesIO()
    defaults: dict[str, object] = {
        "vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CODE for line in text.splitlines()),
        model_writer=model,
        minloglevel=3,
        **(defaults | settings),
    )
    return model.getvalue()
