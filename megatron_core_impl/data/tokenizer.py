"""Text to token ids and back, by the tokenizer files that a model comes with: SentencePiece or Hugging Face.

Both kinds add nothing to a text: no BOS, no EOS. Text that looks like a special token (`</s>` in a web page) is text and
never becomes the control id, unless `parse_special` asks for what Megatron-LLM does. Special tokens that a run adds to the
vocabulary have the ids behind it; one that the tokenizer has already keeps its id, and is special from then on, even if the
tokenizer's file would find it in any text (added tokens that are not flagged special, user-defined pieces).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megatron_core_impl.data.indexed_dataset import Tokens
from megatron_core_impl.data.segments import SegmentMemory, huggingface_memory, sentencepiece_memory
from megatron_core_impl.data.special_tokens import as_text
from megatron_core_impl.json_files import read_json

Kind = Literal["sentencepiece", "huggingface"]
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token of Hugging Face, beside special
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
        """SHA-256 of what defines text to ids: the tokenizer's file, and the added tokens where there are any."""

    @property
    def added_tokens(self) -> dict[str, int]:
        """The special tokens that were asked for, and their ids."""

    @property
    def control_tokens(self) -> dict[str, int]:
        """All that are special, those that were asked for among them: written as, and their ids."""

    @property
    def named_tokens(self) -> dict[str, str]:
        """What the tokenizer's own file calls them, such as bos_token, where it does; else other files of the folder say it."""

    def id_of(self, token: str) -> int | None:
        """The id of a token, special or not; None: it is none."""

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_flat(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The same ids as one array, text after text, and how many each text has. The fastest way for many texts."""

    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(
    folder: Path | str,
    kind: Kind | Literal["auto"] = "auto",
    *,
    parse_special: bool = False,
    added_tokens: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: holds `tokenizer.model`, or `tokenizer.json` and what goes with it.
        kind: which of them; auto takes `tokenizer.model` if it is there.
        parse_special: special tokens written out in a text become their ids, as in Megatron-LLM.
        added_tokens: special tokens that the vocabulary is to have besides its own, ids from its size on, in this order.

    Raises:
        ValueError: the file is missing or no tokenizer of this kind, or an added token is empty, named twice, or an ordinary
            word of the tokenizer.
    """
    folder = Path(folder)
    if "" in added_tokens or len(set(added_tokens)) < len(added_tokens):
        raise ValueError(f"added tokens {list(added_tokens)} must be texts that differ from each other, none of them empty")
    kinds: list[Kind] = list(FILES) if kind == "auto" else [kind]
    found = [kind for kind in kinds if (folder / FILES[kind]).is_file()]
    if not found:
        raise ValueError(f"{folder}: has no {' or '.join(FILES[kind] for kind in kinds)}, so no tokenizer")
    if found[0] == "sentencepiece":
        return SentencePieceTokenizer(folder / FILES["sentencepiece"], parse_special, added_tokens)
    return HuggingFaceTokenizer(folder / FILES["huggingface"], parse_special, added_tokens)


def _fingerprint(definition: bytes, added_tokens: Sequence[str]) -> str:
    added = json.dumps(list(added_tokens)).encode() if added_tokens else b""
    return hashlib.sha256(definition + added).hexdigest()


def _check_is_no_word(token: str, number: int, encode: Callable[[str], list[int]], *, is_byte: bool = False) -> None:
    """A token that the vocabulary has can be special only if no text becomes it.

    Raises:
        ValueError: some does.
    """
    if is_byte or any(number in encode(text) for text in (token, f"a{token}", f"\n{token}", f" {token} ")):
        raise ValueError(
            f"added token {token!r} is an ordinary piece of the vocabulary, id {number}, which any text that holds it becomes. "
            "Write a special token otherwise"
        )


class SentencePieceTokenizer:
    """A SentencePiece model, and the tokens that its folder's other files put behind it. Ids as those of Megatron-LLM with
    --no_new_tokens.

    Attributes:
        library: the library's own, for what is not done here.
    """

    kind: Kind = "sentencepiece"

    def __init__(self, file: Path, parse_special: bool, added_tokens: Sequence[str]) -> None:
        model = file.read_bytes()
        self.fingerprint = _fingerprint(model, added_tokens)
        try:
            self.library = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self.library.vocab_size() if model else 0
        except RuntimeError:
            self.vocab_size = 0
        if self.vocab_size == 0:
            raise ValueError(
                f"{file}: is no SentencePiece model. Where tokenizer.json is there too: preprocess.tokenizer: huggingface"
            )
        if any(self._is_text(token) for token in added_tokens):
            self.library = sentencepiece.SentencePieceProcessor(model_proto=_with_controls(model, added_tokens))
        self.eod_id = _known(self.library.eos_id())
        self.bos_id = _known(self.library.bos_id())
        self._special = {self.library.id_to_piece(i): i for i in (self.bos_id, self.eod_id) if i is not None}
        behind = _tokens_behind(file.parent, self.vocab_size)
        rows = read_json_object(file.parent / "config.json").get("vocab_size", math.inf)
        self._behind = {token: number for token, number in behind.items() if number < rows}  # the model has a row for these
        self.vocab_size = 1 + max(self._behind.values(), default=self.vocab_size - 1)
        following = 1 + max(behind.values(), default=self.vocab_size - 1)
        for token in added_tokens:
            known = behind.get(token, self.id_of(token))
            if known is not None and self._is_text(token):
                _check_is_no_word(token, known, self.library.encode, is_byte=self.library.is_byte(known))
            if known is None:
                known, following = following, following + 1
            self._special[token] = known
            self.vocab_size = max(self.vocab_size, known + 1)
        self.added_tokens = {token: self._special[token] for token in added_tokens}
        self._parsed = re.compile(f"({'|'.join(map(re.escape, self._special))})") if parse_special and self._special else None

    @property
    def control_tokens(self) -> dict[str, int]:
        """See `Tokenizer`."""
        pieces = range(self.library.vocab_size())
        controls = {self.library.id_to_piece(i): i for i in pieces if self.library.is_control(i)}
        return controls | self._behind | self.added_tokens

    @property
    def named_tokens(self) -> dict[str, str]:
        """See `Tokenizer`."""
        numbers = {"bos_token": self.bos_id, "eos_token": self.eod_id}
        return {name: self.library.id_to_piece(number) for name, number in numbers.items() if number is not None}

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer`."""
        number: int = self.library.piece_to_id(token)
        return number if self.library.id_to_piece(number) == token else self._behind.get(token)  # else it is the unknown

    def _is_text(self, token: str) -> bool:
        """Whether a token is one that text may become."""
        number: int = self.library.piece_to_id(token)
        is_piece = self.library.id_to_piece(number) == token
        return is_piece and not self.library.is_control(number) and not self.library.is_unknown(number)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in this thread."""
        if self._parsed is not None:
            return [self._encode_parsing(text) for text in texts]
        ids: list[list[int]] = self.library.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Ids of all texts, one after another, and how many each has; by remembered segments where the model allows it."""
        if self._parsed is not None and any(map(self._parsed.search, texts)):
            return _flat(self.encode_batch(texts))
        if self._memory is not None:
            return self._memory.encode(texts)
        ids = self.library.encode(list(texts), return_type="numpy", num_threads=1)
        return np.concatenate([np.empty(0, np.int32), *ids]), np.fromiter(map(len, ids), np.int64, len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, added tokens written out; control tokens have none."""
        added = {number: token for token, number in (self._behind | self.added_tokens).items()}
        text = ""
        for is_added, group in groupby((int(i) for i in ids), added.__contains__):
            run = list(group)
            text += "".join(added[i] for i in run) if is_added else self.library.decode(run)
        return text

    @cached_property
    def _memory(self) -> SegmentMemory | None:
        return sentencepiece_memory(self.library)

    def _encode_parsing(self, text: str) -> list[int]:
        assert self._parsed is not None
        ids: list[int] = []
        for number, part in enumerate(self._parsed.split(text)):  # text, token, text, token, …, text
            ids += [self._special[part]] if number % 2 else self.library.encode(part, out_type=int)
        return ids


def _with_controls(model: bytes, tokens: Sequence[str]) -> bytes:
    """A model in which some pieces are control tokens that it would else find in a text before anything is merged."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece in proto.pieces:
        if piece.piece in tokens and piece.type == kinds.USER_DEFINED:
            piece.type = kinds.CONTROL
    changed: bytes = proto.SerializeToString()
    return changed


class HuggingFaceTokenizer:
    """A fast tokenizer, read from `tokenizer.json` by the library that made it.

    Added tokens that are not marked special there (some models' runs of spaces) are part of the text's encoding, unless they
    begin or end a text.

    Attributes:
        library: the library's own, for what is not done here.
        text_library: the same for text, in which no special token is found.
    """

    kind: Kind = "huggingface"

    def __init__(self, file: Path, parse_special: bool, added_tokens: Sequence[str]) -> None:
        definition = file.read_bytes()
        self.fingerprint = _fingerprint(definition, added_tokens)
        try:
            self.library = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{file}: is no tokenizer that the tokenizers library reads: {error}") from error
        self.library.no_truncation()  # both may be left in the file by whoever saved it
        self.library.no_padding()
        self.library.encode_special_tokens = True  # as text
        self.text_library = self.library
        self.added_tokens = {token: self._add(token, file) for token in added_tokens}
        self.vocab_size = self._size()
        self.eod_id = self._named_token(file.parent, "eos_token")
        self.bos_id = self._named_token(file.parent, "bos_token")
        for number in (self.eod_id, self.bos_id):
            if number is not None and (token := self.library.get_added_tokens_decoder().get(number)) is not None:
                self._make_special(token.content)
        self.library.encode_special_tokens = not parse_special
        self.text_library = self.library if parse_special else as_text(self.library)

    @property
    def control_tokens(self) -> dict[str, int]:
        """See `Tokenizer`."""
        added = self.library.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def named_tokens(self) -> dict[str, str]:
        """See `Tokenizer`: none here."""
        return {}

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer`."""
        number: int | None = self.library.token_to_id(token)
        return number

    def _size(self) -> int:
        return 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)

    def _add(self, token: str, file: Path) -> int:
        """The id of a token, which becomes special, and is added where it is not there."""
        known, size, was_special = self.id_of(token), self._size(), token in self.control_tokens
        self._make_special(token)
        number = self.id_of(token)
        assert number is not None
        if known is None and number != size:
            raise ValueError(
                f"{file}: added token {token!r} would get id {number}, not {size}, for its ids have gaps: name it there"
            )
        if known is not None and not was_special:
            _check_is_no_word(token, number, self._encode)
        return number

    def _make_special(self, token: str) -> None:
        flags = self.library.get_added_tokens_decoder().get(-1 if (known := self.id_of(token)) is None else known)
        if flags is None or not flags.special:
            kept = {name: flags is not None and getattr(flags, name) for name in TOKEN_FLAGS}
            self.library.add_special_tokens([tokenizers.AddedToken(token, **kept, special=True)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Uses all cores, unless the environment says TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self.text_library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Ids of all texts, one after another, and how many each has; by remembered segments where the model allows it."""
        if self._memory is not None:
            return self._memory.encode(texts)
        return _flat([self._encode(text) for text in texts])  # one by one: encodings of many are large, and slow for that

    @cached_property
    def _memory(self) -> SegmentMemory | None:
        return huggingface_memory(self.text_library, self._encode, self.vocab_size)

    def _encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]  # faster than the library's encode, which finds places too

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def _named_token(self, folder: Path, name: str) -> int | None:
        """Id of the eos or bos token: tokenizer_config.json names its text, config.json its id."""
        token = read_json_object(folder / "tokenizer_config.json").get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None:
            found: int | None = self.library.token_to_id(text)
            if found is None:
                raise ValueError(f"{folder / 'tokenizer_config.json'}: {name} {text!r} is no token of tokenizer.json")
            return found
        number = read_json_object(folder / "config.json").get(f"{name}_id")
        if isinstance(number, list):  # several may end a text; the first is the one that training writes
            number = number[0] if number else None
        if number is not None and self.library.id_to_token(number) is None:
            raise ValueError(f"{folder / 'config.json'}: {name}_id={number} is no token of tokenizer.json")
        return None if number is None else int(number)


def _tokens_behind(folder: Path, size: int) -> dict[str, int]:
    """The tokens that a folder's other files add behind the pieces of its tokenizer.model, and their ids.

    Whoever tuned a model before has put theirs there: <pad>, or the marks of a chat template.
    """
    found: dict[str, int] = dict(read_json_object(folder / "added_tokens.json"))
    for number, token in read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[token["content"]] = int(number)
    for token in read_json_object(folder / "tokenizer.json").get("added_tokens", []):
        found[token["content"]] = token["id"]
    return {token: number for token, number in found.items() if number >= size}


def _flat(ids: Sequence[Sequence[int]]) -> tuple[Tokens, npt.NDArray[np.int64]]:
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(sizes.sum())), sizes


def _known(number: int) -> int | None:
    """SentencePiece writes -1 for a token that a model does not have."""
    return number if number >= 0 else None


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file that need not be there."""
    return read_json(file) if file.exists() else {}
