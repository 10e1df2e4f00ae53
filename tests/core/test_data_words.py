"""Words found by translated patterns: those of the library, for the patterns of the field and all kinds of steps."""

import json
import random
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import AWKWARD, CODE, fuzz, write
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from megatron_core_impl.data import words as words_module
from megatron_core_impl.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_core_impl.data.word_patterns import ASCII, members, translated
from megatron_core_impl.data.words import GPT_2, Step, Words, steps_of, words_of

ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
DEEPSEEK_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
PATTERNS = {
    "gpt-2": GPT_2,
    "llama-3": rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}",
    "qwen-2": rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "cl100k-possessive": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTED}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTED}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}",
    "kimi": rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{UPPER[:-1]}&&[^\p{{Han}}]]*{LOWER[:-1]}&&[^\p{{Han}}]]+{CONTRACTED}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER[:-1]}&&[^\p{{Han}}]]+{LOWER[:-1]}&&[^\p{{Han}}]]*{CONTRACTED}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}",
    "deepseek-digits": r"\p{N}{1,3}",
    "deepseek-cjk": "[一-龥぀-ゟ゠-ヿ]+",
    "deepseek-3": rf"{DEEPSEEK_SIGNS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{ENDS}",
    "deepseek-coder-lines": "[\r\n]",
    "deepseek-coder-letters": r"\s?\p{L}+",
    "deepseek-coder-signs": r"\s?\p{P}+",
    "deepseek-llm-letters": "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-Ϋ]+",
    "deepseek-llm-signs": "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
    "deepseek-llm-ends": r"\s+$",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "falcon-digits": "[0-9][0-9][0-9]",
    "looks": r"\s+(?=\S)|(?<=\s)\S+|(?<!x)y|[^y]",
    "looks-ahead": r"[a-z]+(?! )|.",
    "looks-far": r"a(?=7 )7|.",
    "looks-back": r"(?<=a) +|.",
    "joined": "[a-z] |.",
    "gives-nothing-back": r"a?+a|[^a]",
    "named": r"(?<word>\p{L}+(?<_2>[0-9]|(s))?)|(?<word>.)",
    "seldom": r"(a|Sa)b*?|[a-cS]{2}|l{1,}|'{1,2}+!|.\n|\x41\u0042\.",
}
LETTERS = ["a", "S", "l", "'", "7", " ", "\n", "\r", "\t", "!", "_", "/", "\x1c"]


@cache
def ascii_texts(length: int, count: int) -> list[str]:
    rng = random.Random(4)
    codes = [chr(code) for code in range(128)]
    long = ["".join(rng.choices(LETTERS if i % 2 else codes, k=rng.randint(5, 60))) for i in range(count)]
    return [*("".join(text) for size in range(1, length + 1) for text in product(LETTERS, repeat=size)), *long, *codes]


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_of_all_short_texts_are_those_of_the_library(name: str) -> None:
    part = translated(PATTERNS[name])
    assert part is not None
    for behavior, invert in (("isolated", False), ("removed", True)):
        splits, pattern = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior, invert=invert), Step(part, invert).pattern()
        for text in ascii_texts(4 if behavior == "isolated" else 3, 4000):
            assert pattern.findall(text) == [piece for piece, _ in splits.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize(
    "one",
    [r"\s", r"\S", r"\w", r"\W", r"\d", r"\D", ".", "$", r"\p{L}", r"\p{Lu}", r"\p{Ll}", r"\p{M}", r"\p{N}", r"\p{Nd}",
     r"\p{P}", r"\p{Pc}", r"\p{Po}", r"\p{S}", r"\p{Sm}", r"\p{Sc}", r"\p{Z}", r"\p{Zs}", r"\P{L}", r"[^\s\p{L}]", r"[a\-c]",
     "[a-]", "[-a]", "[+--]", "[!-/]", r"[\]\\^]", "(?i:[a-cK])", "(?i:k)", "[é-ü]", "[a-ü]", r"\v", "é", r"[^é]",
     r"\p{Han}", r"\P{Han}", "(?i:')", r"[\n-\r]", "a&b", r"\ ", "~", "&",
     "[a-c&&b-d]", "[a-c7&&[^b]]", "[^a-c&&b]", r"[\p{Lu}\p{Lo}&&[^\p{Han}]]", r"[\p{L}&&[a-d]&&[^bé]]", "[a[b&&c]]",
     "[[ab]&&[bc]d]", r"[\p{Han}&&a]", r"[^\p{Han}&&a]", r"[a&&\&b]", "[a-c&&-b]", r"[[^a]&&\^a]",
     "[a[b-d]7]", "[^a[b\\s]]", "[a[^b]]", "[^a[^b]]", "[[a][b]]", "[[[a]]]", "(?i:[a[b]])"],
)  # fmt: skip
def test_sets_are_those_of_the_library(one: str) -> None:
    part, splits = translated(f"(?:{one})x"), pre_tokenizers.Split(Regex(f"(?:{one})x"), "isolated")
    assert part is not None
    pattern = Step(part).pattern()
    for code in range(128):
        for text in (f"{chr(code)}x", f"x{chr(code)}x\nx", f"{chr(code)}\n"):
            assert pattern.findall(text) == [piece for piece, _ in splits.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize(
    "pattern",
    ["a*", "a|", "", "(?:a*)+b", "a{1,2}?", "a{2}?", "a{,2}", "a{2", "a{2,1}", "a{0}b", "a+{2}", "a**", "(?m:a)",
     r"(?<n>a)\k<n>", r"(?<n>a|b\g<n>)", r"(?<n>a)\1", "(?<1>a)", "(?<>a)", "(?'n'a)", "(?P<n>a)",
     "(?i)a", "(?-i:a)", "(?>a+)", "(?:ab)++", r"(a)\1", r"\ba", r"\h", r"\R", r"\X", r"\pL", r"\p{^L}", r"\p{Alpha}",
     r"\p{Latin}", "^a", r"\Aa", r"a\z", "[[:alpha:]]", "[a&&]", "[&&a]", "[^&&a]", "[a&&&b]", "[a&&b&&]", "[a-&&b]",
     "(?i:[a&&a])", "(?i:[a[^b]])", "[a[b]", "[a[]b]]", "[[a]-c]", "[]a]", "[^]a]", r"[a-\d]", "[a-c-e]", "[z-a]",
     "[a", "(a", "a)", "(?i:ß)", "(?i:[^a])", r"(?i:\p{Lu})", "(?i:[ſ])", r"\xe9", r"\x{41}", r"\0a", r"\k", "(?=a)*b",
     "(?<=a+)b", "(?#a)b", "a]", "a}", "(?~a)", r"\Ka", r"\Ga", r"\p{}", "a\\"],
)  # fmt: skip
def test_what_engines_may_treat_otherwise_is_not_translated(pattern: str) -> None:
    assert translated(pattern) is None


def test_where_a_pattern_surely_matches() -> None:
    """Only where the library finds a match, whatever follows."""
    sure = set()
    for name, pattern in PATTERNS.items():
        if (part := translated(pattern)) is None:
            continue
        if part.alone == ASCII:
            sure.add(name)
        splits = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        for character in members(part.alone):
            for after in ["", *LETTERS, "é", " é", "\n\n", "  "]:
                assert splits.pre_tokenize_str(character + after)[0][1][0] == 0, (name, character, after)
    assert sure == {"gpt-2", "llama-3", "qwen-2", "cl100k", "cl100k-possessive", "o200k", "kimi", "tekken"}


# ── Whole tokenizers ────────────────────────────────────────────────────────────────────────────────────────────────────────

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(name: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(PATTERNS[name]), behavior, invert=invert)


def sequence(*listed: Any) -> Any:
    return pre_tokenizers.Sequence(list(listed))


def steps(*listed: Any) -> Any:
    return sequence(*listed, BYTES)


BERT = normalizers.BertNormalizer()
ROBERTA, FIRST = pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace(prepend_scheme="first")
NOTHING_BACK = pre_tokenizers.Split(Regex(r"(?>\p{L}+)|."), "isolated")
SPLITTERS: dict[str, tuple[Any, Any, bool]] = {  # name: splitter, normalizer, whether its first step is known
    **{
        name: (steps(split(name)), None, True)
        for name in ("llama-3", "cl100k", "cl100k-possessive", "kimi", "tekken", "seldom", "gives-nothing-back",
                     "looks", "looks-ahead", "looks-far", "looks-back")
    },
    "qwen-2": (steps(split("qwen-2")), normalizers.NFC(), True),
    "phi-4": (steps(split("cl100k", "removed", invert=True)), None, True),
    "removed-between": (steps(split("deepseek-coder-letters", "removed", invert=True)), None, True),
    "o200k": (steps(split("o200k")), normalizers.NFKC(), True),
    "lower-joined": (steps(split("joined")), normalizers.Lowercase(), True),
    "lower": (steps(split("o200k")), normalizers.Lowercase(), True),
    "deepseek-3": (steps(*map(split, ("deepseek-digits", "deepseek-cjk", "deepseek-3"))), None, True),
    "deepseek-coder": (
        steps(*map(split, ("deepseek-coder-lines", "deepseek-coder-letters", "deepseek-coder-signs", "deepseek-cjk")),
              pre_tokenizers.Digits(True)), None, True),
    "deepseek-llm": (
        steps(split("deepseek-coder-lines"), *map(split, ("deepseek-llm-letters", "deepseek-llm-signs", "deepseek-llm-ends")),
              split("deepseek-cjk"), pre_tokenizers.Digits(True)), None, True),
    "starcoder-2": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), None, True),
    "falcon-like": (
        steps(pre_tokenizers.Punctuation("contiguous"), split("gpt-2"), split("falcon-digits"), pre_tokenizers.Digits(False)),
        None, True),
    "roberta": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, True),
    "roberta-nfkc": (pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFKC(), True),
    "bloom": (steps(split("bloom")), None, True),
    "named": (steps(split("named")), None, True),
    "nothing-back": (steps(NOTHING_BACK), None, False),
    "twice-prefixed": (
        sequence(pre_tokenizers.Split(Regex(r"(?<n>\p{L})\k<n>|\p{N}*"), "isolated"), split("gpt-2"), ROBERTA), None, False),
    "spaces-removed": (steps(pre_tokenizers.Split(Regex(" "), "removed")), None, False),
    "letters-together": (steps(pre_tokenizers.Split(Regex(r"(?>\p{L})"), "contiguous")), None, False),
    "text": (steps(pre_tokenizers.Split("a", "isolated")), None, False),
    "digits-prefixed": (sequence(pre_tokenizers.Digits(True), ROBERTA), None, True),
    "digits-nothing-back": (steps(pre_tokenizers.Digits(True), NOTHING_BACK), None, True),
    "xlm": (sequence(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()), normalizers.NFKC(), True),
    "xlm-first": (sequence(pre_tokenizers.WhitespaceSplit(), FIRST), None, False),
    "xlm-nested": (sequence(pre_tokenizers.WhitespaceSplit(), sequence(FIRST)), None, False),
    "punctuation-scripts": (sequence(pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts()), None, True),
    "scripts": (pre_tokenizers.UnicodeScripts(), None, False),
    "removed": (steps(split("gpt-2", "removed")), None, False),
    "merged": (steps(split("gpt-2", "merged_with_previous")), None, False),
    "merged-next": (steps(split("llama-3", "merged_with_next")), None, False),
    "metaspace": (pre_tokenizers.Metaspace(), None, True),
    "metaspace-ascii": (pre_tokenizers.Metaspace(replacement="_"), None, False),
    "metaspace-never": (pre_tokenizers.Metaspace(prepend_scheme="never"), None, True),
    "metaspace-first": (pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.Lowercase(), True),
    "metaspace-nfkc": (pre_tokenizers.Metaspace(), normalizers.NFKC(), True),
    "bert": (pre_tokenizers.BertPreTokenizer(), BERT, True),
    "bert-cased": (pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(lowercase=False), True),
    "bert-bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), BERT, True),
    "whitespace": (pre_tokenizers.Whitespace(), None, True),
    "whitespace-split": (pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]), None, True),
    "stripped": (pre_tokenizers.Whitespace(), normalizers.Strip(), True),
    "delimiter": (pre_tokenizers.CharDelimiterSplit("-"), None, True),
    "delimiter-space": (pre_tokenizers.CharDelimiterSplit(" "), None, True),
    "delimiter-letter": (pre_tokenizers.CharDelimiterSplit("s"), None, True),
    "delimiter-other": (pre_tokenizers.CharDelimiterSplit("é"), None, False),
}  # fmt: skip
UNCUT = {"metaspace-ascii", "delimiter-other", "xlm-first", "xlm-nested", "scripts", "text"}


def model_of(kind: str) -> tuple[Any, Any]:
    special = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    if kind == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return models.BPE(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **special)
    if kind == "unigram":
        return models.Unigram(), trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **special)
    if kind == "wordpiece":
        return models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=200, **special)
    return models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=60, **special)


def made(folder: Path, name: str, kind: str = "bpe") -> dict[str, Any]:
    """Train and write a tokenizer."""
    model, trainer = model_of(kind)
    tokenizer = tokenizers.Tokenizer(model)
    splitter, normalizer, _ = SPLITTERS[name]
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CODE, trainer)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    write(folder, "tokenizer.json", definition)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return definition


KINDS = [
    *((name, "bpe") for name in SPLITTERS),
    *(("bert", kind) for kind in ("wordpiece", "words", "unigram")),
    *(("metaspace", kind) for kind in ("wordpiece", "unigram")),
    ("xlm", "unigram"),
    *(("whitespace", kind) for kind in ("wordpiece", "words", "unigram")),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_ids_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    monkeypatch.setattr(words_module, "NEAR", 3)
    definition = made(tmp_path, name, kind)
    assert (words_of(definition) is not None) == SPLITTERS[name][2]
    texts = [*AWKWARD, *fuzz(300, seed=5), *ascii_texts(2, 300), "\u00a0x", " \u212a s", "\x0bA\x00 b\tC", "ÉCOLE Été 7\n"]
    for parse_special in (False, True):
        tokenizer = load_tokenizer(tmp_path, parse_special=parse_special)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert (tokenizer._memory is None) == (name in UNCUT)
        if parse_special:
            texts = [text for text in texts if "<" in text]  # others hold no token
        expected = tokenizer.encode_batch(texts)
        for _ in range(2):
            assert tokenizer.encode_flat(texts)[0].tolist() == [token for ids in expected for token in ids]


@pytest.mark.parametrize("name", ["nothing-back", "metaspace", "whitespace"])
def test_what_has_other_ids_each_time_is_not_remembered(tmp_path: Path, name: str) -> None:
    definition = made(tmp_path, name)
    definition["model"]["dropout"] = 0.5
    write(tmp_path, "tokenizer.json", definition)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer._memory is None


@cache
def mixed_texts() -> list[str]:
    letters = ["a", "S", "'", "7", " ", "\n", "\r", "!", "é", "\u0301", "\u3000", "好"]
    rng = random.Random(6)
    short = [text for length in range(1, 4) for text in product(letters, repeat=length)]
    longer = [rng.choices(letters, k=rng.randint(4, 8)) for _ in range(1500)]
    return [*map("".join, [*short, *longer]), *filter(None, fuzz(500, seed=7))]


@pytest.mark.parametrize("name", [name for name, (_, _, is_known) in SPLITTERS.items() if is_known])
def test_text_of_other_characters_is_cut_where_words_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each segment split by the library alone: the words of the whole text."""
    monkeypatch.setattr(words_module, "NEAR", 1)
    definition = made(tmp_path, name)
    found = words_of(definition)
    assert isinstance(found, Words)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    splitter = library.pre_tokenizer
    left = sequence(*(splitter[number] for number in range(found.done, len(steps_of(definition)))))

    @cache
    def words(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    def of_ascii(segment: str) -> list[str]:
        return [word for first in found.words(segment) for word, _ in left.pre_tokenize_str(first)]

    def in_segments(text: str) -> list[str]:
        parts = ((of_ascii if segment.isascii() else words)(segment) for segment in found.segments(text))
        return [word for part in parts for word in part]

    for short in (0, 100):
        monkeypatch.setattr(words_module, "SHORT", short)
        for text in mixed_texts():
            assert in_segments(text) == words(text), (short, text)


def test_a_text_with_few_other_characters_is_cut_around_them(tmp_path: Path) -> None:
    found = words_of(made(tmp_path, "cl100k"))
    assert found is not None
    text = "x = 1\n" * 60 + 'print(f("é"), end)\n' + "x = 1\n" * 60
    other = [segment for segment in found.segments(text) if not segment.isascii()]
    assert len(other) == 1
    assert len(other[0]) < 40
    accents = "été naïve déjà vu, où ça " * 100
    assert max(map(len, found.segments(accents))) < 40, "words that come again"
    assert list(found.segments("好" * 500)) == ["好" * 500]


def test_a_long_text_is_cut_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "LONG", 10)
    for name in ("cl100k", "deepseek-coder", "metaspace"):
        made(tmp_path, name)
        tokenizer = load_tokenizer(tmp_path)
        expected = tokenizer.encode_batch(CODE)
        assert tokenizer.encode_flat(CODE)[0].tolist() == [token for ids in expected for token in ids]
