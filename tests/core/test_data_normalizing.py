"""Normalizers and added tokens, which come before a text is cut: the ids of the library, whatever they are."""

import json
import random
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tiny_tokenizers import AWKWARD, CODE, fuzz, sentencepiece_model, write
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer, WordLevelTrainer

from megatron_core_impl.data.found_first import DEEPEST, longest_of
from megatron_core_impl.data.normalizing import normalizing
from megatron_core_impl.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_core_impl.data.words import GPT_2


def precompiled() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model(normalization_rule_name="nmt_nfkc"))
    return normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)


TWO_SPACES = normalizers.Replace(Regex(" {2,}"), " ")
NORMALIZERS: dict[str, Any] = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfkd": normalizers.NFKD(),
    "lower": normalizers.Lowercase(),
    "bert": normalizers.BertNormalizer(),
    "bert-cased": normalizers.BertNormalizer(lowercase=False),
    "bert-unclean": normalizers.BertNormalizer(clean_text=False),
    "marks": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "gemma": normalizers.Replace(" ", "▁"),
    "removes": normalizers.Replace("e", ""),
    "replaces": normalizers.Replace(Regex(r"\s+"), " "),
    "prepends": normalizers.Prepend(" x"),
    "strip": normalizers.Strip(),
    "strip-left": normalizers.Strip(left=True, right=False),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "nmt": normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), TWO_SPACES]),
    "in-turn": normalizers.Sequence([normalizers.Replace("a", "e"), normalizers.Replace("e", "x"), normalizers.Prepend("a")]),
    "nothing": normalizers.Sequence([]),
    "precompiled": normalizers.Sequence([precompiled(), TWO_SPACES]),
    "bytes": normalizers.ByteLevel(),
}
SPLITTERS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt-2-pattern": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT_2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "roberta": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "metaspace": pre_tokenizers.Metaspace(),
    "metaspace-first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "whitespace": pre_tokenizers.Whitespace(),
    "whole": pre_tokenizers.Metaspace(split=False),
    "whole-first": pre_tokenizers.Metaspace(split=False, prepend_scheme="first"),
    "whole-never": pre_tokenizers.Metaspace(split=False, prepend_scheme="never"),
    "at-spaces": pre_tokenizers.Split(" ", "merged_with_previous"),
    "nothing": None,
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Any]]:
    """A tokenizer.json for each splitter."""
    return {name: _trained(name, splitter) for name, splitter in SPLITTERS.items()}


def _trained(name: str, splitter: Any) -> dict[str, Any]:
    special = ["<unk>", "</s>"]
    lines = [line for text in CODE for line in text.splitlines(keepends=True)]
    if name == "whitespace":
        library = tokenizers.Tokenizer(WordLevel(unk_token="<unk>"))
        library.pre_tokenizer = splitter
        library.train_from_iterator(lines, WordLevelTrainer(vocab_size=60, special_tokens=special, show_progress=False))
    elif name in ("gpt-2", "gpt-2-pattern", "roberta"):
        library = tokenizers.Tokenizer(BPE())
        library.pre_tokenizer = splitter
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
        library.train_from_iterator(lines, trainer)
    else:
        library = tokenizers.Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = BpeTrainer(vocab_size=420, special_tokens=[*special, *BYTES], show_progress=False)
        library.train_from_iterator([line.rstrip("\n") for line in lines], trainer)
        if splitter is not None:
            library.pre_tokenizer = splitter
    definition: dict[str, Any] = json.loads(library.to_str())
    definition["added_tokens"] = definition["added_tokens"][: len(special)]
    return definition | ({"pre_tokenizer": None} if splitter is None else {})


def loaded(
    folder: Path, definition: dict[str, Any], normalizer: Any, tokens: list[AddedToken], *, parse_special: bool = False
) -> HuggingFaceTokenizer:
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    if normalizer is not None:
        library.normalizer = normalizer
    library.add_tokens(tokens)
    write(folder, "tokenizer.json", json.loads(library.to_str()))
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    tokenizer = load_tokenizer(folder, parse_special=parse_special)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def check(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> None:
    expected = tokenizer.encode_batch(texts)
    for _ in range(2):  # the second time from memory
        ids, sizes = tokenizer.encode_flat(texts)
        found = [text_ids.tolist() for text_ids in np.split(ids, np.cumsum(sizes)[:-1])]
        assert found == expected, next(repr(text) for text, f, e in zip(texts, found, expected, strict=True) if f != e)


TOKENS = {
    "none": [],
    "rows": [
        *(AddedToken("\n" * count, normalized=False) for count in range(1, 5)),
        *(AddedToken(" " * count, normalized=True) for count in (2, 3, 4, 8)),
        AddedToken("self", normalized=False),
        AddedToken("SELF", normalized=True),
        AddedToken("foo bar", normalized=True),
    ],
    "special": [
        AddedToken("<|im|>", normalized=False, special=True),
        AddedToken("</s>\n", normalized=False),
        AddedToken("\n", normalized=False),
        AddedToken("\n\nx", normalized=False, special=True),
        AddedToken("  ", normalized=True, special=True),
        AddedToken("\u00a0 ", normalized=True),
        AddedToken("X", normalized=True, special=True),
        AddedToken("x", normalized=True),
    ],
    "choosy": [
        AddedToken("self", normalized=False, single_word=True),
        AddedToken("7", normalized=False, lstrip=True),
        AddedToken("!", normalized=True, rstrip=True),
    ],
}
SIGNS = ["a", "X", "x", "7", "!", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "\u00a0", "\u3000", "▁", "好", "self", "</s>"]


def mixed(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(SIGNS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_ids_are_those_of_the_library(tmp_path: Path, trained: dict[str, dict[str, Any]], splitter: str, tokens: str) -> None:
    rows = ["\x00a", "\x0b a", "e", " e ", "\u2028 x", "x\n\n\nself  foo bar</s>\nSELF"]
    texts = [*AWKWARD, *fuzz(40, seed=8), *mixed(80, seed=9), *rows]
    for name, normalizer in NORMALIZERS.items():
        found = [token for token in TOKENS[tokens] if normalizer is None or normalizer.normalize_str(token.content)]
        tokenizer = loaded(tmp_path, trained[splitter], normalizer, found, parse_special=name in ("nfc", "strip"))
        check(tokenizer, texts)


@pytest.mark.parametrize("name", [name for name in NORMALIZERS if name != "none"])
def test_what_python_normalizes_is_as_the_library_does(name: str) -> None:
    library = NORMALIZERS[name]
    holder = tokenizers.Tokenizer(BPE())
    holder.normalizer = library
    normalize = normalizing(json.loads(holder.to_str())["normalizer"], library)
    letters = [*map(chr, range(128)), "é", "Σ", "\u00a0", "▁", " e"]
    for text in ["", *letters, *map("".join, product(letters, repeat=2)), *fuzz(300), *mixed(300, seed=3)]:
        assert normalize(text) == library.normalize_str(text), repr(text)


@pytest.mark.parametrize(
    ("splitter", "normalizer", "is_cut"),
    [
        ("gpt-2", "precompiled", True),
        ("gpt-2-pattern", "strip", True),
        ("roberta", "nmt", True),
        ("metaspace", "precompiled", True),
        ("metaspace-first", "lower", True),
        ("metaspace-first", "strip", False),  # whether a mark is put before depends on what was removed
        ("whole-first", "removes", False),
        ("at-spaces", "gemma", True),
        ("at-spaces", "none", False),
        ("nothing", "marks", True),
    ],
)
def test_no_normalizer_keeps_a_text_from_being_cut(
    tmp_path: Path, trained: dict[str, dict[str, Any]], splitter: str, normalizer: str, is_cut: bool
) -> None:
    tokens = [AddedToken("\n\n", normalized=False), AddedToken("self", normalized=False), AddedToken("SELF", normalized=True)]
    tokenizer = loaded(tmp_path, trained[splitter], NORMALIZERS[normalizer], tokens)
    assert (tokenizer._memory is not None) == is_cut
    if is_cut and not splitter.endswith("first"):  # where a token is found, the pieces around it are cut
        assert tokenizer._memory is not None
        tokenizer._memory._encode_text = _refuse
        tokenizer.encode_flat(["x\n\nself  y", "SELF é"])


def _refuse(text: str) -> list[int]:
    raise AssertionError(text)


def test_a_pattern_finds_the_longest() -> None:
    rng = random.Random(1)
    for _ in range(300):
        texts = list({"".join(rng.choices("ab .", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 12))})
        plain = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
        text = "".join(rng.choices("ab .", k=60))
        assert re.findall(longest_of(texts), text) == re.findall(plain, text)
    for longest in (DEEPEST, DEEPEST + 900):
        assert re.fullmatch(longest_of([" " * count for count in range(1, longest + 1)]), " " * longest)


def test_what_is_normalized_is_not_normalized_again(tmp_path: Path, trained: dict[str, dict[str, Any]]) -> None:
    """Text of other characters goes through the library, behind the normalizer."""
    twice = normalizers.Replace("é", "éé")
    for name in ("gpt-2", "gpt-2-pattern", "metaspace"):
        check(loaded(tmp_path, trained[name], twice, []), ["é", "a été b", *fuzz(100)])
