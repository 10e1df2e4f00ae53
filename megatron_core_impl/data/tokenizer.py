"""Text to token ids and back, by the tokenizer files that a model comes with: SentencePiece or Hugging Face.

Both kinds add nothing to a text: no BOS, no EOS. Text that looks like a special token (`</s>` in a web page) is text and
never becomes the control id, unless `parse_special` asks for what Megatron-LLM does.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece
import tokenizers

Kind = Literal["sentencepiece", "huggingface"]
FILES: dict[Kind, str] = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}  # in the order auto tries


class Tokenizer(Protocol):
    """What the two kinds have in common."""

    @property
    def kind(self) -> Kind: ...
    @property
    def vocab_size(self) -> int:
        """The largest id that can occur, plus 1."""

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document: the tokenizer's EOS."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file that defines text to ids."""

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(folder: Path | str, kind: Kind | Literal["auto"] = "auto", *, parse_special: bool = False) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: holds `tokenizer.model`, or `tokenizer.json` and what goes with it.
        kind: which of them; auto takes `tokenizer.model` if it is there.
        parse_special: special tokens written out in a text become their ids, as in Megatron-LLM.

    Raises:
        ValueError: the file is missing or no tokenizer of this kind.
    """
    folder = Path(folder)
    kinds: list[Kind] = list(FILES) if kind == "auto" else [kind]
    found = [kind for kind in kinds if (folder / FILES[kind]).is_file()]
    if not found:
        raise ValueError(f"{folder}: has no {' or '.join(FILES[kind] for kind in kinds)}, so no tokenizer")
    if found[0] == "sentencepiece":
        return SentencePieceTokenizer(folder / FILES["sentencepiece"], parse_special=parse_special)
    return HuggingFaceTokenizer(folder / FILES["huggingface"], parse_special=parse_special)


class SentencePieceTokenizer:
    """A SentencePiece model. Ids as those of Megatron-LLM with --no_new_tokens."""

    kind: Kind = "sentencepiece"

    def __init__(self, file: Path, *, parse_special: bool = False) -> None:
        model = file.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._model.vocab_size() if model else 0
        except RuntimeError:
            self.vocab_size = 0
        if self.vocab_size == 0:
            raise ValueError(
                f"{file}: is no SentencePiece model. Where tokenizer.json is there too: preprocess.tokenizer: huggingface"
            )
        self.eod_id = _known(self._model.eos_id())
        self.bos_id = _known(self._model.bos_id())
        special = [self._model.id_to_piece(i) for i in (self.bos_id, self.eod_id) if i is not None]
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})") if parse_special and special else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in this thread."""
        if self._special is not None:
            return [self._encode_parsing(text) for text in texts]
        ids: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens have none."""
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def _encode_parsing(self, text: str) -> list[int]:
        assert self._special is not None
        ids: list[int] = []
        for number, part in enumerate(self._special.split(text)):  # text, token, text, token, …, text
            ids += [self._model.piece_to_id(part)] if number % 2 else self._model.encode(part, out_type=int)
        return ids


class HuggingFaceTokenizer:
    """A fast tokenizer, read from `tokenizer.json` by the library that made it.

    Added tokens that are not marked special there (some models' runs of spaces) are part of the text's encoding.
    """

    kind: Kind = "huggingface"

    def __init__(self, file: Path, *, parse_special: bool = False) -> None:
        definition = file.read_bytes()
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{file}: is no tokenizer that the tokenizers library reads: {error}") from error
        self._model.encode_special_tokens = not parse_special
        self._model.no_truncation()  # both may be left in the file by whoever saved it
        self._model.no_padding()
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eod_id = self._named_token(file.parent, "eos_token")
        self.bos_id = self._named_token(file.parent, "bos_token")

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Uses all cores, unless the environment says TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def _named_token(self, folder: Path, name: str) -> int | None:
        """Id of the eos or bos token: tokenizer_config.json names its text, config.json its id."""
        token = _read_json(folder / "tokenizer_config.json").get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None:
            found: int | None = self._model.token_to_id(text)
            if found is None:
                raise ValueError(f"{folder / 'tokenizer_config.json'}: {name} {text!r} is no token of tokenizer.json")
            return found
        number = _read_json(folder / "config.json").get(f"{name}_id")
        if isinstance(number, list):  # several may end a text; the first is the one that training writes
            number = number[0] if number else None
        if number is not None and self._model.id_to_token(number) is None:
            raise ValueError(f"{folder / 'config.json'}: {name}_id={number} is no token of tokenizer.json")
        return None if number is None else int(number)


def _known(number: int) -> int | None:
    """SentencePiece writes -1 for a token that a model does not have."""
    return number if number >= 0 else None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that need not be there."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: is no JSON object")
    return content
