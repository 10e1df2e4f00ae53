"""Tokenizers of both kinds: ids as the libraries give them, special tokens in a text, what names them, what is refused."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import CODE, train_huggingface, train_sentencepiece

from megatron_core_impl.data.tokenizer import load_tokenizer

AWKWARD = [
    "", " ", "\n", "a", "</s>", "<s>hello</s>", "x</s></s>y", "<unk>", "  two", "trailing  ", "tabs\t\r\nCRLF\r",
    "héllo", "你好", "😀👩\u200d🚀", "\x00nul", "\ufeffbom", "\u2028", "<0x0A><0x41>", "<|im_start|>user", *CODE,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both kinds."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(folder)
    train_huggingface(folder)
    return folder


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


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


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
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is not JSON"):
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
