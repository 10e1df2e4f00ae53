"""Text that holds control tokens, as `marks` has them, to ids; and where in the ids each region of it ends.

A whole text is encoded at once, so ids are those of a tokenizer that finds its special tokens in it by itself, only that text
which spells one stays text. A Hugging Face tokenizer gets a stand-in for each control token, which no text holds, with the
flags of the token; afterwards its id becomes the token's. SentencePiece knows no tokens in a text: what lies between two is a
text of its own, and begins with the mark of a word, as in Megatron-LLM.

A token that lies across the border of two regions belongs to the answer.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken

from megatron_core_impl.data.chat_template import ASSISTANT, Region
from megatron_core_impl.data.marks import CONTROL, FIRST_NUMBER
from megatron_core_impl.data.tokenizer import TOKEN_FLAGS, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

CONTROL_TOKEN = re.compile(f"{CONTROL}(.)", re.DOTALL)

Ids = npt.NDArray[np.int64]
Span = tuple[int, int]


class EncodedText(NamedTuple):
    """A text's ids, and how many of them belong to each of its regions."""

    ids: Ids
    sizes: list[int]


class TextEncoder(Protocol):
    """Encodes texts that `chat_template` made."""

    def encode(self, texts: Sequence[Sequence[Region]]) -> list[EncodedText]: ...


def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    """The encoder for a tokenizer, which it takes over: a Hugging Face one encodes plain text differently from now on."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _HuggingFace(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _SentencePiece(tokenizer)


class _HuggingFace:
    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._model = tokenizer.text_library
        self._model.post_processor = None  # it would cut spaces off the places of tokens
        tokens, decoder = tokenizer.control_tokens, tokenizer.library.get_added_tokens_decoder()
        stand_ins = []
        for number, i in enumerate(tokens.values()):
            flags = {name: getattr(decoder[i], name) for name in TOKEN_FLAGS}
            stand_ins.append(AddedToken(CONTROL + chr(FIRST_NUMBER + number), **flags, special=False))
        self._model.add_tokens(stand_ins)
        self._id_of = np.arange(tokenizer.vocab_size + len(tokens), dtype=np.int64)
        for stand_in, i in zip(stand_ins, tokens.values(), strict=True):
            own = self._model.token_to_id(stand_in.content)
            assert own is not None
            self._id_of[own] = i

    def encode(self, texts: Sequence[Sequence[Region]]) -> list[EncodedText]:
        encodings = self._model.encode_batch(["".join(r.text for r in regions) for regions in texts], add_special_tokens=False)
        results = []
        for regions, encoding in zip(texts, encodings, strict=True):
            count = len(encoding.ids)
            cuts = [_cut(count, encoding.token_to_chars, place, role) for place, role in _borders(regions)]
            sizes = np.diff([0, *cuts, count]).tolist()
            results.append(EncodedText(self._id_of[np.array(encoding.ids, np.int64)], sizes))
        return results


class _SentencePiece:
    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._model = tokenizer.library
        self._controls = list(tokenizer.control_tokens.values())

    def encode(self, texts: Sequence[Sequence[Region]]) -> list[EncodedText]:
        texts_of = ["".join(region.text for region in regions) for regions in texts]
        parts = [CONTROL_TOKEN.split(text) for text in texts_of]  # text, number of a control token, text, …, text
        # Places of tokens cost twice the time, and are needed only where a border lies within a part.
        is_cut = [_cut_parts(part, regions) for part, regions in zip(parts, texts, strict=True)]
        plain = [part[i] for part, cut in zip(parts, is_cut, strict=True) for i in range(0, len(part), 2) if i not in cut]
        ids_of_plain = iter(self._model.encode(plain, out_type=int, num_threads=1))
        return [
            self._assemble(part, cut, regions, ids_of_plain) for part, cut, regions in zip(parts, is_cut, texts, strict=True)
        ]

    def _assemble(
        self, parts: Sequence[str], cut: set[int], regions: Sequence[Region], plain: Iterator[list[int]]
    ) -> EncodedText:
        """Tokens of a text from those of its parts."""
        ids: list[int] = []
        spans: list[Span] = []  # of the tokens in the text, as exact as its borders need
        start = 0
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._controls[ord(part) - FIRST_NUMBER])
                spans.append((start, start + 2))
                start += 2
                continue
            if i in cut:
                found = self._model.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                spans += [(start + begin, start + end) for begin, end in found["offsets"]]
            else:
                of_part = next(plain)
                ids += of_part
                spans += [(start, start + len(part))] * len(of_part)
            start += len(part)
        cuts = [_cut(len(ids), spans.__getitem__, place, role) for place, role in _borders(regions)]
        return EncodedText(np.array(ids, np.int64), np.diff([0, *cuts, len(ids)]).tolist())


def _borders(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """Where one region ends and the next begins, and the role of the first."""
    places = accumulate(len(region.text) for region in regions[:-1])
    return [(place, region.role) for place, region in zip(places, regions, strict=False)]


def _cut_parts(parts: Sequence[str], regions: Sequence[Region]) -> set[int]:
    """The numbers of the parts within which a border lies."""
    starts = [0, *accumulate(len(part) + i % 2 for i, part in enumerate(parts))]  # the mark of a control token is one more
    places = [place for place, _ in _borders(regions)]
    return {bisect_right(starts, place) - 1 for place in places if place not in starts}


def _cut(count: int, span_of: Callable[[int], Span | None], place: int, role_before: int) -> int:
    """How many of the tokens belong before a place in the text. One that lies across it is the answer's."""

    def begins(number: int) -> bool:
        span = span_of(number)
        assert span is not None
        return span[0] >= place

    def is_after(number: int) -> bool:
        span = span_of(number)
        assert span is not None
        return span[0] >= place or span[1] > place

    return bisect_left(range(count), True, key=begins if role_before == ASSISTANT else is_after)
