"""Ids from remembered segments of text: those of the tokenizer libraries, several times as fast.

A BPE model of sentencepiece merges two neighbours only into a piece of its vocabulary. So where no piece holds two characters
next to each other, no merge ever crosses the place between them, and the text on either side has the ids it would have alone:
the text can be cut there. In the vocabularies of Llama and Mistral no piece holds a word mark (▁, the space) after another
character, a letter of ASCII beside its punctuation, a digit beside anything, or a newline. What is left between the cuts are
words, runs of punctuation and single digits, which repeat so much that a memory of bounded size holds nearly all of a text.

A byte-level BPE model (GPT-2's, Falcon's) splits a text into words before it merges anything, by a pattern for which a word
ends where the class of character changes. Text can be cut there too, if the white space before a word stays with it. Of other
tokenizers that split a text into words, by patterns of their own or at white space, these are the segments (`words`).

A tokenizer of Hugging Face finds added tokens before anything else (`found_first`), and normalizes what lies between
(`normalizing`). What has been normalized is cut, each piece like a text of its own, and encoded without its normalizer.

Whether this holds is read from the tokenizer's own definition; where it does not, the library does it all. So it does for a
text in which sentencepiece would take a word mark for a space, and for one with an added token that has to do with what is
around it.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, pairwise, product
from string import ascii_letters, digits
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Model
from tokenizers.pre_tokenizers import PreTokenizer

from megatron_core_impl.data.found_first import Piece, found_first
from megatron_core_impl.data.indexed_dataset import Tokens
from megatron_core_impl.data.normalizing import normalizing
from megatron_core_impl.data.untranslated_split import untranslated_split
from megatron_core_impl.data.words import steps_of, words_of

WORD_MARK = "▁"
MAX_SEGMENTS = 1 << 18  # that are remembered: some 50 MB
MAX_CHARACTERS = 1 << 24  # of them together, where segments are long
LONGEST = 256  # characters of a segment that is remembered
NOTHING_REMOVED = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")  # normalizers that leave something of each character
AT_ONCE = 1 << 18  # segments that are listed at once, and characters of a text that is cut at once
GUARD = "\n"  # stands in front of a segment that is encoded, so that the word mark of a text's beginning does not touch it

_OTHERS = "".join(chr(i) for i in range(128) if chr(i) not in ascii_letters + digits)  # punctuation, controls, the space


def sentencepiece_cuts(model: bytes) -> re.Pattern[str] | None:
    """The pattern whose matches, one after another, are the segments of a text; None where the model allows no cuts.

    Args:
        model: a serialized SentencePiece model.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    is_known = (
        trained.model_type == sentencepiece_model_pb2.TrainerSpec.BPE  # a unigram model weighs a text as a whole
        and trained.byte_fallback  # else neighbours without a piece are one unknown
        and not trained.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and all(p.type != piece.USER_DEFINED for p in proto.pieces)  # these are found before anything is merged
    )
    merged = [p.piece for p in proto.pieces if p.type in (piece.NORMAL, piece.UNUSED)]
    pairs = {pair for text in merged for pair in pairwise(text)}
    touches_guard = any(GUARD in pair for pair in pairs)
    return _cuts_between(pairs, " ") if is_known and not touches_guard else None


def _cuts_between(
    pairs: set[tuple[str, str]], mark: str, *, is_fused: Callable[[str], bool] = lambda character: False
) -> re.Pattern[str] | None:
    """The same, of the characters that pieces have side by side.

    Args:
        mark: how the text has the word mark.
        is_fused: whether a character becomes one unknown with neighbours of its kind.
    """
    unknown = [chr(i) for i in range(128) if is_fused(chr(i))]
    pairs = pairs | set(product(unknown, unknown))
    if any(b == WORD_MARK != a for a, b in pairs) or is_fused(WORD_MARK):
        return None
    # Classes of ASCII characters that no piece joins are cut apart, and a class that no piece has two of in a row, into single
    # characters.
    joined = [{c} for c in (ascii_letters, digits, _OTHERS.replace(mark, ""))]
    for a, b in pairs:
        touched = [group for group in joined if any(a in cls for cls in group) or any(b in cls for cls in group)]
        if len(touched) == 2 and _is_ascii(a) and _is_ascii(b):
            joined.remove(touched[1])
            touched[0].update(touched[1])
    classes = ["".join(sorted(group)) for group in joined]
    runs = [f"[{re.escape(cls)}]{'+' if any(a in cls and b in cls for a, b in pairs) else ''}" for cls in classes]
    # The last alternative is a text that ends in spaces, or begins with something else than ASCII.
    # With that go what follows, up to the next word, or line, where no line's end is joined: few pieces are known apart there.
    ends = mark if is_fused("\n") or any(b == "\n" != a for a, b in pairs) else f"{mark}\\n"
    return re.compile(f"{mark}*(?:{'|'.join(runs)}|)(?:[^\\x00-\\x7f{mark}][^{ends}]*)?")


def _is_ascii(character: str) -> bool:
    return character.isascii() and character != WORD_MARK


def merge_cuts(definition: dict[str, Any]) -> Callable[[str], Iterable[str]] | None:
    """What cuts a normalized text for a tokenizer of Hugging Face that does not split it: BPE as sentencepiece's, as Llama 2
    and Gemma have it.

    Args:
        definition: the content of tokenizer.json.
    """
    model, splitter = definition["model"], definition.get("pre_tokenizer") or {}
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = names | {model.get("unk_token")}  # what a character becomes that has no piece
    is_marked = splitter.get("type") == "Metaspace" and splitter["replacement"] == WORD_MARK and not splitter["split"]
    is_known = (
        (not splitter or is_marked or (splitter == AT_SPACES and _leaves_no_space(definition.get("normalizer"))))
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        # What has no piece is left out where there is nothing for it to become, and its neighbours touch.
        and (names <= model["vocab"].keys() if model.get("byte_fallback") else model.get("unk_token") is not None)
        and not any(part in unknown for merge in model["merges"] for part in merge)
    )
    if not is_known:
        return None
    is_fused = model.get("fuse_unk") and not model.get("byte_fallback")
    pairs = {pair for a, b in model["merges"] for pair in pairwise(a + b)}
    cuts = _cuts_between(pairs, WORD_MARK, is_fused=lambda character: bool(is_fused) and character not in model["vocab"])
    if cuts is None:
        return None
    cut = cutter(cuts, WORD_MARK if is_marked and splitter["prepend_scheme"] != "never" else "")
    return (lambda text: cut(text.replace(" ", WORD_MARK))) if is_marked else cut


AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}  # as Gemma has it


def _leaves_no_space(normalizer: dict[str, Any] | None) -> bool:
    steps = (normalizer or {}).get("normalizers") or [normalizer or {}]
    return steps[-1].get("pattern") == {"String": " "} and " " not in steps[-1]["content"]


# The white space before a word; the word; and what follows from the first character of which more must be known on, up to white
# space that follows an ASCII character that is none: an apostrophe may begin 's or 't, and Unicode has its own white space.
_WORDS = re.compile(
    r"[ \n\t\r]*(?:[A-Za-z]+|[0-9]+|[!-&(-/:-@\[-`{-~]+|)"
    r"(?:['\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\U0010ffff][^ \n\t\r]*(?:(?<![!-~])[ \n\t\r]+[^ \n\t\r]*)*)?"
)
_SPLITTERS = ("ByteLevel", "Punctuation", "Digits")  # at changes of class, whatever their options but one


def byte_level_cuts(definition: dict[str, Any]) -> re.Pattern[str] | None:
    """The same for a tokenizer of Hugging Face. Its added tokens are the caller's matter.

    Args:
        definition: the content of tokenizer.json.
    """
    model, splitter = definition.get("model") or {}, definition.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else [splitter]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("fuse_unk"):
        return None
    is_known = (
        all(step.get("type") in _SPLITTERS or _is_three_digits(step) for step in steps)
        and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and all(step.get("behavior") == "Contiguous" for step in steps if step.get("type") == "Punctuation")
    )
    return _WORDS if is_known else None


def _is_three_digits(step: dict[str, Any]) -> bool:
    """Falcon cuts numbers every three digits."""
    return step.get("type") == "Split" and step.get("pattern") == {"Regex": "[0-9][0-9][0-9]"}


def cutter(cuts: re.Pattern[str], prefix: str = "") -> Callable[[str], Iterable[str]]:
    """What cuts a text into the matches of a pattern.

    Args:
        prefix: what a text is to begin with, and gets where it does not.
    """

    def cut(text: str) -> Iterable[str]:
        if not text.startswith(prefix):
            text = prefix + text
        return cuts.findall(text) if len(text) <= AT_ONCE else (match[0] for match in cuts.finditer(text))

    return cut


class SegmentMemory(dict[Piece, bytes]):
    """The ids of segments met before, as bytes.

    Args:
        cut: gives the segments of a text; None: the text is encoded as a whole.
        encode_segment: ids of a segment.
        encode_text: ids of a whole text.
        vocab_size: ids are below this.
    """

    def __init__(
        self,
        cut: Callable[[str], Iterable[Piece] | None],
        encode_segment: Callable[[str], list[int]],
        encode_text: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        super().__init__()
        self._cut, self._encode_segment, self._encode_text = cut, encode_segment, encode_text
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The ids of all texts, one after another, and how many each has."""
        parts = [self._encode(text) if text else b"" for text in texts]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts)) // self._dtype.itemsize
        return np.frombuffer(b"".join(parts), self._dtype), sizes

    def _encode(self, text: str) -> bytes:
        segments = self._cut(text)
        if segments is None:
            return self._bytes(self._encode_text(text))
        if len(text) <= AT_ONCE:
            return b"".join(map(self.__getitem__, segments))
        # Some segments at a time: a list of all takes thirty times the memory of the text.
        ids, left = bytearray(), iter(segments)
        while some := list(islice(left, AT_ONCE)):
            ids += b"".join(map(self.__getitem__, some))
        return bytes(ids)

    def __missing__(self, segment: Piece) -> bytes:
        if isinstance(segment, int):
            return self.setdefault(segment, self._bytes([segment]))
        ids = self._bytes(self._encode_segment(segment))
        if len(segment) > LONGEST:
            return ids
        if len(self) >= MAX_SEGMENTS or self._characters >= MAX_CHARACTERS:
            self.clear()
            self._characters = 0
        self[segment] = ids
        self._characters += len(segment)
        return ids

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, self._dtype).tobytes()


def sentencepiece_memory(model: SentencePieceProcessor) -> SegmentMemory | None:
    """The memory for a model of sentencepiece; None where it allows no cuts."""
    cuts = sentencepiece_cuts(model.serialized_model_proto())
    if cuts is None:
        return None
    guard = len(model.encode(GUARD))  # ids of the word mark and the guard

    def encode_segment(segment: str) -> list[int]:
        ids: list[int] = model.encode(GUARD + segment)
        return ids[guard:]

    # The library puts a space before any text, also one that begins with a space.
    cut = cutter(cuts)
    return SegmentMemory(
        lambda text: None if WORD_MARK in text else cut(" " + text), encode_segment, model.encode, model.vocab_size()
    )


def huggingface_memory(library: Tokenizer, encode: Callable[[str], list[int]], vocab_size: int) -> SegmentMemory | None:
    """The memory for a tokenizer of Hugging Face; None where nothing is known that allows cuts.

    Args:
        library: the tokenizer.
        encode: by it, ids of a text.
        vocab_size: ids are below this.
    """
    definition = json.loads(library.to_str())
    way, normalizer = _way(definition, library), definition.get("normalizer")
    # Whether a mark is put before a piece then depends on its place in the text, and on what was removed before it.
    is_first = (definition.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
    if way is None or (is_first and normalizer is not None and normalizer["type"] not in NOTHING_REMOVED):
        return None
    cut, encode_segment = way
    pieces_of = found_first(
        library.get_added_tokens_decoder().values(),
        library.token_to_id,
        normalizing(normalizer, library.normalizer),
        special=not library.encode_special_tokens,
        alike=not is_first,
    )

    def segments(text: str) -> Iterable[Piece] | None:
        """The segments of a text, its added tokens among them."""
        pieces = pieces_of(text)
        if pieces is None:
            return None
        if len(pieces) == 1 and isinstance(pieces[0], str):
            return cut(pieces[0])
        return chain.from_iterable([piece] if isinstance(piece, int) else cut(piece) for piece in pieces)

    return SegmentMemory(segments, encode_segment, encode, vocab_size)


def _way(
    definition: dict[str, Any], library: Tokenizer
) -> tuple[Callable[[str], Iterable[str]], Callable[[str], list[int]]] | None:
    """What cuts a normalized text, and gives the ids of a segment."""
    model, splitter, listed = library.model, library.pre_tokenizer, steps_of(definition)
    steps = [splitter] if len(listed) == 1 else [splitter[number] for number in range(len(listed))]
    if (cuts := byte_level_cuts(definition)) is not None:
        return cutter(cuts), _encoder(model, steps)
    if (cut := merge_cuts(definition)) is not None:
        return cut, _encoder(model, [])
    if (words := words_of(definition)) is not None:
        whole, rest = _encoder(model, steps), _encoder(model, steps[words.done :])

        def encode_words(segment: str) -> list[int]:
            return list(chain.from_iterable(map(rest, words.words(segment)))) if segment.isascii() else whole(segment)

        return words.segments, encode_words
    if (split := untranslated_split(definition)) is not None:
        return split, _encoder(model, steps[1:])
    return None


def _encoder(model: Model, steps: list[PreTokenizer]) -> Callable[[str], list[int]]:
    """Gives the ids of a text by some steps of a pre-tokenizer and a model: no normalizer, no added tokens."""
    if not steps:
        return lambda text: [token.id for token in model.tokenize(text)]
    library = Tokenizer(model)  # the model is one
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(text: str) -> list[int]:
        ids: list[int] = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    return encode
