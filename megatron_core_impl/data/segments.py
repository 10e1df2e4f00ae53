"""Ids from remembered segments of text: those of the tokenizer libraries, several times as fast.

A BPE model of sentencepiece merges two neighbours only into a piece of its vocabulary. So where no piece holds two characters
next to each other, no merge ever crosses the place between them, and the text on either side has the ids it would have alone:
the text can be cut there. In the vocabularies of Llama and Mistral no piece holds a word mark (▁, the space) after another
character, a letter of ASCII beside its punctuation, a digit beside anything, or a newline. What is left between the cuts are
words, runs of punctuation and single digits, which repeat so much that a memory of bounded size holds nearly all of a text.

A byte-level BPE model (GPT-2's, Falcon's) splits a text into words before it merges anything, by a pattern for which a word
ends where the class of character changes. Text can be cut there too, if the white space before a word stays with it. Of other
tokenizers that split a text into words, by patterns of their own or at white space, these are the segments (`words`).

Whether this holds is read from the tokenizer's own definition; where it does not, the library does it all. So it does for a
text that holds what the library looks for before anything else: a word mark, which sentencepiece takes for a space, or an
added token.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, pairwise
from string import ascii_letters, digits
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer

from megatron_core_impl.data.indexed_dataset import Tokens
from megatron_core_impl.data.words import words_of

WORD_MARK = "▁"
MAX_SEGMENTS = 1 << 18  # that are remembered: some 50 MB
MAX_CHARACTERS = 1 << 24  # of them together, where segments are long
LONGEST = 256  # characters of a segment that is remembered
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
    return _cuts_between(pairs) if is_known else None


def _cuts_between(pairs: set[tuple[str, str]]) -> re.Pattern[str] | None:
    """The same, of the characters that pieces have side by side; the word mark among them stands for a space."""
    crosses_newline = any("\n" in pair for pair in pairs)
    crosses_word = any(b == WORD_MARK != a for a, b in pairs)
    if crosses_newline or crosses_word:
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


def merge_cuts(definition: dict[str, Any]) -> Callable[[str], Iterable[str]] | None:
    """What cuts a text for a tokenizer of Hugging Face that does not split it: BPE as sentencepiece's, as Llama 2 has it.

    Args:
        definition: the content of tokenizer.json.
    """
    model, normalizer, splitter = definition["model"], definition.get("normalizer"), definition.get("pre_tokenizer")
    if normalizer is None and splitter is not None and splitter["type"] == "Metaspace":
        is_plain = splitter["replacement"] == WORD_MARK and not splitter["split"]
        prefix = ("", ()) if splitter["prepend_scheme"] == "never" else (" ", (" ",))
    else:
        steps = [
            {"type": "Prepend", "prepend": WORD_MARK},
            {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK},
        ]
        is_plain = normalizer == {"type": "Sequence", "normalizers": steps} and splitter is None
        prefix = (" ", ())
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    is_known = (
        is_plain
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and model.get("byte_fallback")  # else neighbours without a piece are one unknown
        and names <= model["vocab"].keys()
        and not any(a in names or b in names for a, b in model["merges"])  # no merge of what the fallback gives
    )
    if not is_known:
        return None
    cuts = _cuts_between({pair for a, b in model["merges"] for pair in pairwise(a + b)})
    return None if cuts is None else cutter(cuts, *prefix)


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


def cutter(cuts: re.Pattern[str], prefix: str = "", prefixed: tuple[str, ...] = ()) -> Callable[[str], Iterable[str]]:
    """What cuts a text into the matches of a pattern.

    Args:
        prefix: what the library puts before a text, unless it begins with one of `prefixed`.
    """

    def cut(text: str) -> Iterable[str]:
        if not text.startswith(prefixed):
            text = prefix + text
        return cuts.findall(text) if len(text) <= AT_ONCE else (match[0] for match in cuts.finditer(text))

    return cut


class SegmentMemory(dict[str, bytes]):
    """The ids of segments met before, as bytes.

    Args:
        cut: gives the segments of a text.
        uncut: a text in which this is found is encoded as a whole; None: no text is.
        encode_segment: ids of a segment.
        encode_text: ids of a whole text.
        vocab_size: ids are below this.
    """

    def __init__(
        self,
        cut: Callable[[str], Iterable[str]],
        uncut: re.Pattern[str] | None,
        encode_segment: Callable[[str], list[int]],
        encode_text: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        super().__init__()
        self._cut, self._uncut = cut, uncut
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
        if len(text) <= AT_ONCE:
            return b"".join(map(self.__getitem__, self._cut(text)))
        # Some segments at a time: a list of all takes thirty times the memory of the text.
        ids, segments = bytearray(), iter(self._cut(text))
        while some := list(islice(segments, AT_ONCE)):
            ids += b"".join(map(self.__getitem__, some))
        return bytes(ids)

    def __missing__(self, segment: str) -> bytes:
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

    return SegmentMemory(cutter(cuts, " "), re.compile(WORD_MARK), encode_segment, model.encode, model.vocab_size())


def huggingface_memory(
    library: Tokenizer, found_first: list[AddedToken], encode: Callable[[str], list[int]], vocab_size: int
) -> SegmentMemory | None:
    """The memory for a tokenizer of Hugging Face; None where nothing is known that allows cuts.

    Args:
        library: the tokenizer.
        found_first: its tokens that are found in a text before anything else.
        encode: by it, ids of a text.
        vocab_size: ids are below this.
    """
    definition, model = json.loads(library.to_str()), library.model
    contents = [token.content for token in found_first]

    def ids_of(word: str) -> list[int]:
        return [token.id for token in model.tokenize(word)]

    def memory(cut: Callable[[str], Iterable[str]], encode_segment: Callable[[str], list[int]]) -> SegmentMemory:
        uncut = re.compile("|".join(map(re.escape, contents))) if contents else None
        return SegmentMemory(cut, uncut, encode_segment, encode, vocab_size)

    if (cuts := byte_level_cuts(definition)) is not None:
        return memory(cutter(cuts), encode)
    if (cut := merge_cuts(definition)) is not None:
        contents.append(WORD_MARK)
        return memory(cut, lambda segment: ids_of(segment.replace(" ", WORD_MARK)))
    words = words_of(definition)
    # An added token may be found in what the normalizer made of a text.
    if words is None or (definition["normalizer"] is not None and any(token.normalized for token in found_first)):
        return None
    is_unsure = words.unsure.search

    def encode_segment(segment: str) -> list[int]:
        return encode(segment) if is_unsure(segment) else list(chain.from_iterable(map(ids_of, words.words(segment))))

    return memory(words.segments, encode_segment)
