"""Ids from remembered segments of text: those of the tokenizer libraries, several times as fast.

A BPE model of sentencepiece merges two neighbours only into a piece of its vocabulary. So where no piece holds two characters
next to each other, no merge ever crosses the place between them, and the text on either side has the ids it would have alone:
the text can be cut there. In the vocabularies of Llama and Mistral no piece holds a word mark (▁, the space) after another
character, a letter of ASCII beside its punctuation, a digit beside anything, or a newline. What is left between the cuts are
words, runs of punctuation and single digits, which repeat so much that a memory of bounded size holds nearly all of a text.

A byte-level BPE model (GPT-2's, Falcon's) splits a text into words before it merges anything, by a pattern for which a word
ends where the class of character changes. Text can be cut there too, if the white space before a word stays with it. Llama 3
and Qwen 2 have a pattern of their own, whose words are the segments.

Whether this holds is read from the tokenizer's own definition; where it does not, the library does it all. So it does for a
text that holds what the library looks for before anything else: a word mark, which sentencepiece takes for a space, or an
added token.
"""

import re
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from string import ascii_letters, digits
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron_core_impl.data.indexed_dataset import Tokens

WORD_MARK = "▁"
MAX_SEGMENTS = 1 << 18  # that are remembered: some 50 MB
MAX_CHARACTERS = 1 << 24  # of them together, where segments are long
AT_ONCE = 1 << 18  # segments that are listed at once, and characters of a text that is cut at once
GUARD = "\n"  # stands in front of a segment that is encoded, so that the word mark of a text's beginning does not touch it

_OTHERS = "".join(chr(i) for i in range(128) if chr(i) not in ascii_letters + digits + " ")  # punctuation and controls
_NOT_ASCII = r"[^\x00-\x7f][^ \n]*"  # with what follows, up to the next word: few pieces are known apart there


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
    crosses_newline = any("\n" in pair for pair in pairs)
    crosses_word = any(b == WORD_MARK != a for a, b in pairs)
    if not is_known or crosses_newline or crosses_word:
        return None
    # Classes of ASCII characters that no piece joins are cut apart, and a class that no piece has two of in a row, into single
    # characters.
    joined = [{c} for c in (ascii_letters, digits, _OTHERS)]
    for a, b in pairs:
        touched = [group for group in joined if any(a in cls for cls in group) or any(b in cls for cls in group)]
        if len(touched) == 2 and _is_ascii(a) and _is_ascii(b):
            joined.remove(touched[1])
            touched[0].update(touched[1])
    classes = ["".join(sorted(group)) for group in joined]
    runs = [f"[{re.escape(cls)}]{'+' if any(a in cls and b in cls for a, b in pairs) else ''}" for cls in classes]
    # The last alternative is a text that ends in spaces, or begins with something else than ASCII.
    return re.compile(f" *(?:{'|'.join(runs)}|)(?:{_NOT_ASCII})?")


def _is_ascii(character: str) -> bool:
    return character.isascii() and character != WORD_MARK


# The white space before a word; the word; and what follows from the first character of which more must be known on, up to white
# space that follows an ASCII character that is none: an apostrophe may begin 's or 't, and Unicode has its own white space.
_WORDS = re.compile(
    r"[ \n\t\r]*(?:[A-Za-z]+|[0-9]+|[!-&(-/:-@\[-`{-~]+|)"
    r"(?:['\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\U0010ffff][^ \n\t\r]*(?:(?<![!-~])[ \n\t\r]+[^ \n\t\r]*)*)?"
)
_SPLITTERS = ("ByteLevel", "Punctuation", "Digits")  # at changes of class, whatever their options but one


# The patterns of words of Llama 3 and of Qwen 2, which differ in how digits are cut.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {r"\p{N}{1,3}": "[0-9]{1,3}", r"\p{N}": "[0-9]"}


def _words_of(digits: str) -> re.Pattern[str]:
    """The words of such a pattern: exactly its matches, as long as all is ASCII that is no control character.

    A word that ends before another character may go on there, and so does the white space before one. From there up to a line
    that begins with printable ASCII, where every word ends, the text is one segment.
    """
    unsure, marks, space = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\U0010ffff", r"!-/:-@\[-`{-~", r"\t \r\n"
    word = (
        rf"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[\t {marks}]?[A-Za-z]+|{digits}| ?[{marks}]+[\r\n]*"
        rf"|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )
    rest = r"[^\n]*(?:\n(?![!-~])[^\n]*)*\n?"
    return re.compile(rf"(?![{space}]++[{unsure}])(?>{word})(?![{unsure}])|{rest}")


_WORDS_OF = {_PATTERN.replace("DIGITS", theirs): _words_of(ours) for theirs, ours in _DIGITS.items()}


def byte_level_cuts(definition: dict[str, Any]) -> re.Pattern[str] | None:
    """The same for a tokenizer of Hugging Face. Its added tokens are the caller's matter.

    Args:
        definition: the content of tokenizer.json.
    """
    model, splitter = definition.get("model") or {}, definition.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else [splitter]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("fuse_unk"):
        return None
    if len(steps) == 2 and steps[0].get("type") == "Split":
        split, bytes_of = steps
        # NFC changes nothing of ASCII, but for what follows it, and that is in one segment with it.
        is_plain = definition.get("normalizer") in (None, {"type": "NFC"}) and bytes_of.get("type") == "ByteLevel"
        is_plain &= not bytes_of.get("add_prefix_space") and not bytes_of.get("use_regex", True)
        is_plain &= split.get("behavior") == "Isolated" and not split.get("invert")
        return _WORDS_OF.get(split.get("pattern", {}).get("Regex")) if is_plain else None
    is_known = (
        definition.get("normalizer") is None
        and all(step.get("type") in _SPLITTERS or _is_three_digits(step) for step in steps)
        and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and all(step.get("behavior") == "Contiguous" for step in steps if step.get("type") == "Punctuation")
    )
    return _WORDS if is_known else None


def _is_three_digits(step: dict[str, Any]) -> bool:
    """Falcon cuts numbers every three digits."""
    return step.get("type") == "Split" and step.get("pattern") == {"Regex": "[0-9][0-9][0-9]"}


class SegmentMemory(dict[str, bytes]):
    """The ids of segments met before, as bytes.

    Args:
        cuts: the pattern of segments.
        prefix: what the library puts before a text.
        uncut: a text in which this is found is encoded as a whole; None: no text is.
        encode_segment: ids of a segment, which may begin with the prefix.
        encode_text: ids of a whole text.
        vocab_size: ids are below this.
    """

    def __init__(
        self,
        cuts: re.Pattern[str],
        prefix: str,
        uncut: re.Pattern[str] | None,
        encode_segment: Callable[[str], list[int]],
        encode_text: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        super().__init__()
        self._cuts = cuts
        self._split: Callable[[str], list[str]] = cuts.findall
        self._prefix, self._uncut = prefix, uncut
        self._encode_segment, self._encode_text = encode_segment, encode_text
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """The ids of all texts, one after another, and how many each has."""
        parts = [self._encode(text) if text else b"" for text in texts]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts)) // self._dtype.itemsize
        return np.frombuffer(b"".join(parts), self._dtype), sizes

    def _encode(self, text: str) -> bytes:
        if self._uncut is not None and self._uncut.search(text):
            return self._bytes(self._encode_text(text))
        if len(text) > AT_ONCE:
            return self._encode_long(self._prefix + text)
        return b"".join(map(self.__getitem__, self._split(self._prefix + text)))

    def _encode_long(self, text: str) -> bytes:
        """The same, some segments at a time: a list of all takes thirty times the memory of the text."""
        ids, segments = bytearray(), (match[0] for match in self._cuts.finditer(text))
        while some := list(islice(segments, AT_ONCE)):
            ids += b"".join(map(self.__getitem__, some))
        return bytes(ids)

    def __missing__(self, segment: str) -> bytes:
        if len(self) >= MAX_SEGMENTS or self._characters >= MAX_CHARACTERS:
            self.clear()
            self._characters = 0
        known = self[segment] = self._bytes(self._encode_segment(segment))
        self._characters += len(segment)
        return known

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

    return SegmentMemory(cuts, " ", re.compile(WORD_MARK), encode_segment, model.encode, model.vocab_size())
