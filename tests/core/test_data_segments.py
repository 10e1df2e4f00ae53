"""Texts cut where a tokenizer's words end, and remembered: the ids of the library, for every vocabulary that allows it."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizers import AWKWARD, CODE, fuzz, sentencepiece_model, write
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_core_impl.data import segments
from megatron_core_impl.data.segments import AT_SPACES, byte_level_cuts, merge_cuts, sentencepiece_cuts, sentencepiece_memory
from megatron_core_impl.data.tokenizer import HuggingFaceTokenizer, load_tokenizer


@pytest.fixture
def folder(tokenizers: Path) -> Path:
    return tokenizers


@pytest.mark.parametrize(
    ("settings", "is_cut"),
    [
        ({}, True),
        ({"split_by_number": False}, True),
        ({"split_digits": True}, True),
        ({"split_by_unicode_script": False, "vocab_size": 400}, True),
        ({"model_type": "unigram", "vocab_size": 305}, False),
        ({"byte_fallback": False, "vocab_size": 64}, False),
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"add_dummy_prefix": False}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"split_by_whitespace": False, "vocab_size": 400}, False),
        ({"user_defined_symbols": ["for"]}, False),
        ({"allow_whitespace_only_pieces": True}, True),
    ],
)
def test_text_is_cut_only_where_the_vocabulary_allows_it(tmp_path: Path, settings: dict[str, object], is_cut: bool) -> None:
    model = sentencepiece_model(**settings)
    assert (sentencepiece_cuts(model) is not None) == is_cut
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    texts = AWKWARD + fuzz(300, seed=1)
    expected = tokenizer.encode_batch(texts)
    for _ in range(2):  # the second time from memory
        assert tokenizer.encode_flat(texts)[0].tolist() == [token for ids in expected for token in ids]


def test_a_piece_with_a_newline_would_touch_what_stands_before_a_segment() -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    assert sentencepiece_cuts(proto.SerializeToString()) is not None
    proto.pieces.add(piece="\n\n", score=-1000.0)
    assert sentencepiece_cuts(proto.SerializeToString()) is None


def test_memory_of_segments_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_SEGMENTS", 20)
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    memory = sentencepiece_memory(model)
    assert memory is not None
    for text in [*CODE, *fuzz(50)]:
        assert memory.encode([text])[0].tolist() == model.encode(text)
        assert len(memory) <= 20


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL, {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
]  # fmt: skip
OTHER = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+|."}, "behavior": "Isolated", "invert": False}


def sequence(*steps: object) -> dict[str, object]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("splitter", "normalizer", "is_cut"),
    [
        (BYTE_LEVEL, None, True),
        (sequence(*FALCON), None, True),
        (BYTE_LEVEL | {"add_prefix_space": True}, None, False),
        (BYTE_LEVEL | {"use_regex": False}, None, False),
        (BYTE_LEVEL, {"type": "NFC"}, True),
        (sequence(OTHER, BYTE_LEVEL | {"use_regex": False}), None, False),
    ],
)
@pytest.mark.parametrize("parse_special", [False, True])
def test_byte_level_text_is_cut_where_words_end(
    folder: Path, tmp_path: Path, splitter: object, normalizer: object, is_cut: bool, parse_special: bool
) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition |= {"pre_tokenizer": splitter, "normalizer": normalizer}
    definition["added_tokens"].append(definition["added_tokens"][-1] | {"id": 301, "content": "self ", "special": False})
    write(tmp_path, "tokenizer.json", definition)
    tokenizer = load_tokenizer(tmp_path, parse_special=parse_special)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (byte_level_cuts(definition) is not None) == is_cut
    texts = [*AWKWARD, *fuzz(1500, seed=2), "don't 's self x", "a' t", "it's'll '", "1234567 12 3", "x \u3000 \u00a0 y\x1c z"]
    expected = [tokenizer.encode(text) for text in texts]
    for _ in range(2):
        assert tokenizer.encode_flat(texts)[0].tolist() == [token for ids in expected for token in ids]


WHOLE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
MARKS = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    """tokenizer.json as Llama 2's: BPE of a text that is not split."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *names], show_progress=False)
    library.train_from_iterator([line for text in CODE for line in text.splitlines()], trainer)
    definition: dict[str, Any] = json.loads(library.to_str())
    definition["added_tokens"] = definition["added_tokens"][:2]
    return definition | {"pre_tokenizer": WHOLE}


KNOWN = "".join(chr(i) for i in range(128) if chr(i) != "\n")
UNKNOWN = [
    "Z;Z Z; ;Z",
    "a;Z;",
    "\x01\x02",
    "a\x01\x02b",
    "é\nß\n\n\x01é \x01\n a",
    "x0 ax a0xa 0\n0é\nx",
    "é)\n\n)\né\n(é e\nee\n",
]


@pytest.mark.parametrize(
    ("changes", "of_model", "is_cut"),
    [
        ({}, {}, True),
        ({"pre_tokenizer": WHOLE | {"prepend_scheme": "first"}}, {}, True),
        ({"pre_tokenizer": WHOLE | {"prepend_scheme": "never"}}, {}, True),
        ({"pre_tokenizer": WHOLE | {"replacement": "_"}}, {}, False),
        ({"pre_tokenizer": WHOLE | {"split": True}}, {}, False),
        ({"pre_tokenizer": None, "normalizer": MARKS}, {}, True),
        ({"pre_tokenizer": None}, {}, True),
        ({"pre_tokenizer": AT_SPACES, "normalizer": MARKS["normalizers"][1]}, {}, True),
        ({"pre_tokenizer": AT_SPACES, "normalizer": MARKS}, {}, True),
        ({"pre_tokenizer": AT_SPACES}, {}, False),
        ({"pre_tokenizer": AT_SPACES, "normalizer": MARKS["normalizers"][1] | {"content": " "}}, {}, False),
        ({"pre_tokenizer": AT_SPACES | {"behavior": "Isolated"}, "normalizer": MARKS}, {}, False),
        ({"normalizer": {"type": "NFC"}}, {}, True),
        ({}, {"merge": ("\n", "\n")}, True),
        ({}, {"merge": ("\n", "e")}, True),
        ({}, {"byte_fallback": False}, True),
        ({}, {"byte_fallback": False, "fuse_unk": False}, True),
        ({}, {"byte_fallback": False, "unk_token": None}, False),
        ({}, {"byte_fallback": False, "merge": ("<unk>", "e")}, False),
        ({}, {"byte_fallback": False, "without": "▁"}, False),
        ({}, {"byte_fallback": False, "merge": ("\n", "\n")}, True),
        ({}, {"byte_fallback": False, "without": "ax0"}, True),
        ({}, {"byte_fallback": False, "known": KNOWN}, True),
        ({}, {"byte_fallback": False, "without": "'()*+,-.012:=>[]_"}, True),
        ({}, {"ignore_merges": True}, False),
        ({}, {"merge": ("<0x0A>", "e")}, False),
        ({}, {"merge": ("e", "▁")}, False),
        ({}, {"merge": ("e", "\n")}, True),
        ({}, {"merge": ("é", "\n")}, True),
        ({}, {"merge": ("e", "1")}, True),
        ({}, {"merge": ("-", "e")}, True),
    ],
)
@pytest.mark.parametrize("parse_special", [False, True])
def test_text_that_is_not_split_is_cut_where_no_merge_joins(
    tmp_path: Path, llama: dict[str, Any], changes: dict[str, Any], of_model: dict[str, Any], is_cut: bool, parse_special: bool
) -> None:
    definition = json.loads(json.dumps(llama | changes))
    model = definition["model"]
    of_model = dict(of_model)
    if merge := of_model.pop("merge", None):
        for piece in (*merge, "".join(merge)):
            model["vocab"].setdefault(piece, len(model["vocab"]))
        model["merges"].insert(0, list(merge))
    without = set(of_model.pop("without", ""))
    model["merges"] = [merge for merge in model["merges"] if not without & set("".join(merge))]
    for number, piece in enumerate(sorted(without)):  # which has no piece then; ids stay
        model["vocab"][f"unused-{number}"] = model["vocab"].pop(piece)
    for character in of_model.pop("known", ""):
        model["vocab"].setdefault(character, len(model["vocab"]))
    model.update(of_model)
    write(tmp_path, "tokenizer.json", definition)
    assert (merge_cuts(definition) is not None) == is_cut
    tokenizer = load_tokenizer(tmp_path, parse_special=parse_special)
    texts = [*AWKWARD, *fuzz(1000, seed=6), "▁x", " ▁ x", "a1b e1 e\ne\n\ne -e--e", "e e  e", *UNKNOWN]
    expected = tokenizer.encode_batch(texts)
    for _ in range(2):
        assert tokenizer.encode_flat(texts)[0].tolist() == [token for ids in expected for token in ids]


def test_what_is_long_is_not_remembered() -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    memory = sentencepiece_memory(model)
    assert memory is not None
    text = "x" * (segments.LONGEST + 1)
    assert memory.encode([text, "x"])[0].tolist() == [*model.encode(text), *model.encode("x")]
    assert max(map(len, memory)) <= segments.LONGEST
