"""The proof that a published tokenizer gives the ids of the data: what is an example, what is found, and what is said."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from workspaces import write_tokenizer

from megatron_core_impl.data.conversation_encoder import ConversationRecipe
from megatron_core_impl.data.preprocessing import Job
from megatron_core_impl.data.text_encoder import TextRecipe
from megatron_core_impl.data.text_files import SourceFile
from megatron_core_impl.data.tokenizer import load_tokenizer
from stages.examples import LONGEST, OF_EACH_SET, SAMPLE, TRIED, Example, difference, read_examples, write_examples

CHAT = {"messages": [{"role": "user", "content": "def?"}, {"role": "assistant", "content": "return  1"}]}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, request.param)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def examples(folder: Path, records: list[dict[str, Any]], *, chat: bool = False, **options: Any) -> list[Example]:
    """Those of some records in two files, as the stage writes them."""
    names = ("a.jsonl", "b.jsonl.gz")
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    half = (len(lines) + 1) // 2
    (folder / names[0]).write_bytes(b"\n{\n" + b"".join(lines[:half]))
    (folder / names[1]).write_bytes(gzip.compress(b"".join(lines[half:])))
    kind = "sentencepiece" if (folder / "tokenizer.model").exists() else "huggingface"
    recipe = ConversationRecipe(folder, kind, "messages", "tokenizer") if chat else TextRecipe(folder, kind, **options)
    job = Job(tuple(SourceFile(folder / name, name) for name in names), recipe, folder / "data")
    write_examples(folder, recipe, [job], load_tokenizer(folder, kind))
    sample, *others = read_examples(folder)
    assert SAMPLE in sample["text"], "there is one, whatever the data are"
    assert chat or difference(AutoTokenizer.from_pretrained(folder), [sample]) is None
    return others


def test_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    texts = ["def f():\n  pass", "", "say </s>", "x" * (LONGEST + 1), "class  A"]
    found = examples(folder, [{"text": text} for text in texts] + [{"none": 1}], bos_eos="both")
    assert [example["text"] for example in found] == [texts[0], texts[3][:LONGEST], texts[4]], "no empty one, none that spells"
    assert [example["ids"] for example in found] == [tokenizer.encode(example["text"]) for example in found]
    assert difference(AutoTokenizer.from_pretrained(folder), found) is None
    assert len(examples(folder, [{"text": "def"}] * 9)) == OF_EACH_SET
    assert examples(folder, [{"text": "</s>"}] * 2 * TRIED + [{"text": "def"}]) == [], "not looked for for long"


def test_what_transformers_reads_otherwise_is_no_example(folder: Path) -> None:
    """White space at the beginning (Llama's), and special tokens of transformers that a text spells."""
    [example] = examples(folder, [{"text": "  def f(): pass"}])
    assert example["text"] == "def f(): pass"
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["pass"]})
    assert difference(theirs, [Example(text=example["text"], ids=[0])]) is None


def test_a_tokenizer_that_gives_other_ids_is_found(folder: Path) -> None:
    [example] = examples(folder, [{"text": "def f(): pass"}])
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = example["ids"]
    wrong = Example(text=example["text"], ids=[*ids[:3], 7, *ids[4:]])
    assert difference(theirs, [example, wrong]) == (
        f"of 'def f(): pass' the ids from 1 on are {ids[1:9]}, the data have {wrong['ids'][1:9]}"
    )
    shorter = Example(text=example["text"], ids=ids[:-1])
    assert str(difference(theirs, [shorter])).startswith("of 'def f(): pass' the ids from ")


def test_a_template_that_renders_otherwise_is_found(folder: Path) -> None:
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "x" * LONGEST}]}
    spelled = {"messages": [{"role": "user", "content": "</s>"}, CHAT["messages"][1]]}
    silent = {"messages": [{"role": "system", "content": ""}, *CHAT["messages"]]}
    [example] = examples(folder, [long, spelled, silent, CHAT], chat=True)
    assert example["messages"] == CHAT["messages"]
    assert example["text"] == "<s>user: def?</s>\n<s>assistant: return  1</s>\n"
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}!")
    assert difference(theirs, [example]) == (
        "it renders a conversation as '<s>user: def?!</s>\\n<s>assistant: return  1!</s>\\n', the data have "
        "'<s>user: def?</s>\\n<s>assistant: return  1</s>\\n'"
    )
