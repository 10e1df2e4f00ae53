"""For tests of chat templates: templates in the manner of the field's, tokenizers that bring them along, and encoders."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tiny_tokenizers import train_huggingface
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_core_impl.data.conversation_encoder import ROLE, TEXT, ConversationEncoder, ConversationRecipe
from megatron_core_impl.data.tokenizer import load_tokenizer

IM = ("<|im_start|>", "<|im_end|>")

LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system_message if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}\n    {%- if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set rules = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (rules if loop.index0 <= 1 else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|im_start|>' + m.role + '\\n\\n' + m.content | trim"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "You  add numbers.\n"},
    {"role": "user", "content": " def add(a, b)? "},
    {"role": "assistant", "content": "  return a + b 🙂 "},
    {"role": "user", "content": "for ö in range(10)"},
    {"role": "assistant", "content": "print(number)\n"},
]


def tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer of transformers with a chat template."""
    train_huggingface(folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    return folder


def encoder(folder: Path, **options: Any) -> ConversationEncoder:
    options = {"kind": "auto", "format": "messages", "template": "tokenizer", "added_tokens": IM} | options
    return ConversationRecipe(folder, **options).encoder()


def encoded(made: ConversationEncoder, *conversations: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and roles of each."""
    result = made.encode([{"messages": turns} for turns in conversations])
    assert not result.malformed, result.malformed
    borders = np.cumsum(result.sizes)[:-1]
    ids, roles = (np.split(result.streams[name], borders) for name in (TEXT, ROLE))
    return [(i.tolist(), r.tolist()) for i, r in zip(ids, roles, strict=True)]


def spelled(made: ConversationEncoder, folder: Path, turns: Sequence[Any]) -> list[tuple[int, str]]:
    """The conversation as stretches of one role."""
    ((ids, roles),) = encoded(made, turns)
    decode = load_tokenizer(folder, "auto", added_tokens=IM).decode
    starts = [i for i in range(len(ids)) if i == 0 or roles[i] != roles[i - 1]]
    return [(roles[a], decode(ids[a:b])) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def oracle(folder: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer in transformers, which gets the added tokens as part of the file."""
    other = shutil.copytree(folder, folder / "with-tokens")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(list(IM))
    made.save(str(other / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(other)
