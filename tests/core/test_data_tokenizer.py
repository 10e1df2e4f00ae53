"""Tokenizers of both kinds: ids as the libraries give them, special tokens in a text, what names them, what is refused."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import AWKWARD, CODE, fuzz, sentencepiece_model, train_huggingface, write

from megatron_core_impl.data.tokenizer import load_tokenizer


@pytest.fixture
def folder(tokenizers: Path) -> Path:
    return tokenizers


def test_sentencepiece_encodes_as_its_library_does(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)  # auto: tokenizer.model first
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.kind == "sentencepiece"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (320, 1, 2)
    assert tokenizer.encode_batch(AWKWARD) == [library.encode(text) for text in AWKWARD]
    assert tokenizer.encode("") == []
    assert tokenizer.fingerprint == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()


def test_huggingface_encodes_as_its_library_does(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "huggingface")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (library.token_to_id("<|im_start|>") + 1, 0, 1)
    library.no_truncation()
    library.no_padding()
    plain = [text for text in AWKWARD if "<" not in text]
    assert tokenizer.encode_batch(plain) == [library.encode(text, add_special_tokens=False).ids for text in plain]
    assert max(len(tokenizer.encode(text)) for text in CODE) > 8  # not cut, and the shorter not padded, as the file asks
    assert len(tokenizer.encode("a")) == 1
    assert tokenizer.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("parse_special", [False, True])
def test_many_texts_at_once_are_the_same_as_one_by_one(folder: Path, kind: str, parse_special: bool) -> None:
    tokenizer = load_tokenizer(folder, kind, parse_special=parse_special)
    texts = AWKWARD + fuzz(500)
    ids, sizes = tokenizer.encode_flat(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert sizes.tolist() == [len(one) for one in expected]
    assert ids.tolist() == [token for one in expected for token in one]
    assert tokenizer.encode_flat([])[0].tolist() == []


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_added_tokens(folder: Path, kind: str) -> None:
    """Golden fact G17: behind the vocabulary, in order; one that is known keeps its id."""
    plain = load_tokenizer(folder, kind)
    assert plain.added_tokens == {}
    base, eod = plain.vocab_size, plain.eod_id
    asked = ("<|im_end|>", "</s>", "<|user|>")
    tokenizer = load_tokenizer(folder, kind, added_tokens=asked)
    assert tokenizer.added_tokens == {"<|im_end|>": base, "</s>": eod, "<|user|>": base + 1}
    assert tokenizer.vocab_size == base + 2
    assert (tokenizer.eod_id, tokenizer.bos_id) == (eod, plain.bos_id)
    assert len({t.fingerprint for t in (plain, tokenizer, load_tokenizer(folder, kind, added_tokens=asked[::-1]))}) == 3
    for text in ("a<|user|>b", "<|im_end|>", "x</s>"):
        assert tokenizer.encode(text) == plain.encode(text)  # text
    parsing = load_tokenizer(folder, kind, added_tokens=asked, parse_special=True)
    assert parsing.encode("a<|user|>b") == [*plain.encode("a"), base + 1, *plain.encode("b")]
    assert parsing.encode("<|im_end|>\n")[0] == base
    for ids in (parsing.encode("a<|user|> b<|im_end|>\n"), [base + 1, base, *plain.encode("b")]):
        assert tokenizer.decode(ids) in ("a<|user|> b<|im_end|>\n", "<|user|><|im_end|>b")
    for wrong in (("",), ("<a>", "<a>")):
        with pytest.raises(ValueError, match=re.escape(f"added tokens {list(wrong)} must be texts that differ")):
            load_tokenizer(folder, kind, added_tokens=wrong)


def not_special(folder: Path, *tokens: str) -> Path:
    """A tokenizer of Hugging Face with added tokens that it finds in any text."""
    train_huggingface(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken(token, rstrip=True, special=False, normalized=False) for token in tokens])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_an_added_token_that_is_known_becomes_special(tmp_path: Path, kind: str) -> None:
    """It keeps its id, and its letters in a text are text."""
    if kind == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=["<|user|>", "<|mine|>"]))
    else:
        not_special(tmp_path, "<|user|>", "<|mine|>")
    plain = load_tokenizer(tmp_path, kind)
    number, other = plain.id_of("<|user|>"), plain.id_of("<|mine|>")
    assert number is not None
    assert other is not None
    assert plain.encode("a<|user|>").count(number) == 1, "as the file has it"
    assert "<|user|>" not in plain.control_tokens
    made = load_tokenizer(tmp_path, kind, added_tokens=("<|user|>", "<|new|>"))
    assert made.added_tokens == {"<|user|>": number, "<|new|>": plain.vocab_size}
    assert made.added_tokens.items() <= made.control_tokens.items()
    for text in ("a<|user|>", "<|user|>", "<|user|> a\n<|user|>"):
        for ids in (made.encode(text), made.encode_flat([text])[0].tolist()):
            assert number not in ids
            assert made.decode(ids) == text
    assert other in made.encode("a<|mine|>"), "those that are not named stay as they are"
    parsing = load_tokenizer(tmp_path, kind, added_tokens=("<|user|>",), parse_special=True)
    assert parsing.encode("a<|user|>b") == [*plain.encode("a"), number, *plain.encode("b")]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_an_ordinary_word_is_no_added_token(folder: Path, kind: str) -> None:
    number = load_tokenizer(folder, kind).id_of("number")
    with pytest.raises(ValueError, match=f"^added token 'number' is an ordinary piece of the vocabulary, id {number}, which"):
        load_tokenizer(folder, kind, added_tokens=("number",))


def test_end_of_text_is_special_whatever_its_flag(tmp_path: Path) -> None:
    not_special(tmp_path, "<|end|>")
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|end|>"})
    made = load_tokenizer(tmp_path)
    assert made.eod_id is not None
    assert made.control_tokens["<|end|>"] == made.eod_id
    assert made.eod_id not in made.encode("a<|end|>")


def test_sentencepiece_token_after_a_special_one_begins_anew(tmp_path: Path) -> None:
    """Golden fact G17, of Megatron-LLM's own splitting."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    parsing = load_tokenizer(tmp_path, added_tokens=("<|im_end|>",), parse_special=True)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert parsing.encode("<|im_end|>\n") == [320, library.piece_to_id("▁"), library.piece_to_id("<0x0A>")]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_text_comes_back(folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(folder, kind)
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text), default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_special_token_in_a_text_is_text(folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer(folder, kind)
    control = {tokenizer.bos_id, tokenizer.eod_id}
    if kind == "huggingface":
        control.add(tokenizer.vocab_size - 1)  # <|im_start|>
    for text in AWKWARD:
        assert not control & set(tokenizer.encode(text))
    parsing = load_tokenizer(folder, kind, parse_special=True)
    a, b = (parsing.encode(letter) for letter in "ab")
    assert parsing.encode("a</s>b") == [*a, parsing.eod_id, *b]  # G17
    assert parsing.encode("<s></s></s>") == [parsing.bos_id, parsing.eod_id, parsing.eod_id]
    assert parsing.encode("") == []


def test_eos_is_named_by_the_configuration(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).eod_id is None
    write(tmp_path, "config.json", {"eos_token_id": [5, 6], "bos_token_id": None})
    assert (load_tokenizer(tmp_path).eod_id, load_tokenizer(tmp_path).bos_id) == (5, None)
    write(tmp_path, "config.json", {"eos_token_id": 5000})
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id=5000 is no token of tokenizer\.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>", "bos_token": {"content": "<s>"}})
    assert (load_tokenizer(tmp_path).eod_id, load_tokenizer(tmp_path).bos_id) == (1, 0)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<end>"})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token '<end>' is no token of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", [])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is no JSON object"):
        load_tokenizer(tmp_path)


def test_missing_or_foreign_file_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: has no tokenizer.model or tokenizer.json, so no tokenizer")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: has no tokenizer.model, so no tokenizer")):
        load_tokenizer(tmp_path, "sentencepiece")
    with pytest.raises(ValueError, match=r"tokenizer\.json: is no tokenizer that the tokenizers library reads"):
        load_tokenizer(tmp_path)
    for content in (b"", b"not a model"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"tokenizer\.model: is no SentencePiece model\. Where tokenizer\.json is there too"
        ):
            load_tokenizer(tmp_path)


# ── No text becomes a special token ─────────────────────────────────────────────────────────────────────────────────────────

SPECIAL = ["<unk>", "<s>", "</s>", "[SEP]"]


def special_in_the_model(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer whose special tokens are pieces of its model, which it finds in a text without looking for special ones."""
    trainers = tokenizers.trainers
    if kind == "unigram":
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    elif kind == "words":
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True, unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator([*CODE, "a b < > / s [ S E P ] x y"] * 3, trainer)
    return made


@pytest.mark.parametrize("kind", ["unigram", "words", "bpe"])
def test_special_tokens_that_are_pieces_of_the_model(tmp_path: Path, kind: str) -> None:
    library = special_in_the_model(kind)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    library.encode_special_tokens = True
    assert library.token_to_id("</s>") in library.encode("a </s> b", add_special_tokens=False).ids, "the trap is there"
    tokenizer = load_tokenizer(tmp_path)
    ids = [library.token_to_id(token) for token in SPECIAL]
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (ids[2], library.get_vocab_size())
    assert tokenizer.control_tokens == dict(zip(SPECIAL, ids, strict=True))
    assert not set(tokenizer.encode("a </s> b [SEP] <s>")) & set(ids[1:])
    assert tokenizer.encode_batch(CODE) == [library.encode(text, add_special_tokens=False).ids for text in CODE]
    assert tokenizer.decode([ids[2]]) == "</s>"
    assert ids[2] in load_tokenizer(tmp_path, parse_special=True).encode("a </s> b")


# ── Tokens behind a SentencePiece model ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_tokens_of_other_files_are_in_nobodys_way(folder: Path, tmp_path: Path, file: str) -> None:
    """A model that was tuned before: `<pad>` and `<|im_end|>` lie behind the pieces of tokenizer.model."""
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    contents = {
        "added_tokens.json": {"<pad>": 320, "<|im_end|>": 321},
        "tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "</s>"}, "320": {"content": "<pad>"},
                                                           "321": {"content": "<|im_end|>"}}},
        "tokenizer.json": {"added_tokens": [{"id": 320, "content": "<pad>"}, {"id": 321, "content": "<|im_end|>"}]},
    }  # fmt: skip
    (tmp_path / file).write_text(json.dumps(contents[file]))
    tokenizer = load_tokenizer(tmp_path, added_tokens=("<|im_start|>", "<|im_end|>"))
    assert tokenizer.added_tokens == {"<|im_start|>": 322, "<|im_end|>": 321}
    assert tokenizer.vocab_size == 323
    assert tokenizer.control_tokens["<pad>"] == 320
    assert tokenizer.decode([320, 322]) == "<pad><|im_start|>"
    assert max(tokenizer.encode("<pad> and <|im_end|>")) < 320, "text"
    assert load_tokenizer(tmp_path).vocab_size == 322

    # Ids that the model has no row for are not used, but taken, as transformers counts them.
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    assert load_tokenizer(tmp_path).vocab_size == 320
    assert "<pad>" not in load_tokenizer(tmp_path).control_tokens
    assert load_tokenizer(tmp_path, added_tokens=("<new>", "<pad>")).added_tokens == {"<new>": 322, "<pad>": 320}
