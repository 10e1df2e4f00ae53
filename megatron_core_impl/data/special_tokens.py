"""Hugging Face tokenizers for text that spells special tokens."""

import json
from typing import Any

from tokenizers import Tokenizer

UNWRITTEN = "\U0010fffe\U0010ffff"  # noncharacters, which no text holds


def as_text(library: Tokenizer) -> Tokenizer:
    """A tokenizer by which no text becomes a special token: the same, or one in which pieces of its model are renamed.

    `encode_special_tokens` keeps the library from finding special tokens before it encodes. But a Unigram model, a list of
    words, and a BPE model that ignores its merges take every piece of their vocabulary where they find it. There the special
    ones are given names that no text has; ids stay.
    """
    definition: dict[str, Any] = json.loads(library.to_str())
    model = definition["model"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return library  # special pieces are not merged from others
    is_listed = isinstance(model["vocab"], list)  # Unigram: pairs of piece and score, in the order of ids
    pieces = [piece for piece, _ in model["vocab"]] if is_listed else list(model["vocab"])
    unknown = pieces[model["unk_id"]] if model.get("unk_id") is not None else model.get("unk_token")
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    hidden = (special & set(pieces)) - {unknown}
    if not hidden:
        return library
    if is_listed:
        model["vocab"] = [[UNWRITTEN + piece if piece in hidden else piece, score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {UNWRITTEN + piece if piece in hidden else piece: i for piece, i in model["vocab"].items()}
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in hidden]
    text = Tokenizer.from_str(json.dumps(definition))
    text.encode_special_tokens = True
    return text
