"""The files of a published tokenizer: what is added, what becomes special, and that everything else keeps its bytes."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from workspaces import write_tokenizer

from stages.tokenizer_files import add_tokens


def test_known_tokens_become_special_and_new_ones_are_added(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "huggingface")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|im_end|>"])  # in the vocabulary, but not special
    tokenizer.save_pretrained(tmp_path)
    known, new = tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer)
    assert "<|im_end|>" not in AutoTokenizer.from_pretrained(tmp_path).all_special_tokens
    add_tokens(tmp_path, {"<|im_start|>": new, "<|im_end|>": known})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert {"<|im_start|>", "<|im_end|>"} <= set(theirs.all_special_tokens)
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [new, known]
    assert len(theirs) == new + 1
    listed = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert all(token["special"] for token in listed if token["content"].startswith("<|im"))


def test_a_decoder_names_all_added_tokens(tmp_path: Path) -> None:
    """transformers gives those that it lacks new ids."""
    write_tokenizer(tmp_path, "huggingface")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    add_tokens(tmp_path, {"<c>": len(tokenizer)})
    decoder = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    named = {token["content"]: int(number) for number, token in decoder.items()}
    assert [named[token] for token in ("<a>", "<b>", "<c>")] == [*ids, len(tokenizer)]
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<a>", "<b>", "<c>"]) == [*ids, len(tokenizer)]


def test_added_tokens_are_special_in_files_of_transformers_5(tmp_path: Path) -> None:
    """Which lists them under another name, and then does not read the old one."""
    write_tokenizer(tmp_path, "huggingface")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<a>"]})
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = ["<a>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    add_tokens(tmp_path, {"<b>": len(tokenizer)})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert {"<a>", "<b>"} <= set(theirs.all_special_tokens)
    assert theirs.convert_tokens_to_ids("<b>") == len(tokenizer)


def test_nothing_to_add_changes_no_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    add_tokens(tmp_path, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
