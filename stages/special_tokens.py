"""Other tokens for the roles that a published tokenizer has tokens for: which ends a text, which pads, and so on.

`export.override_special_tokens` names them, as Megatron-LLM's exporter takes them: {eos: <|im_end|>}. The tokenizer's files,
config.json and the generation settings then say the same, and transformers is asked whether it reads them so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.json_files import read_json
from stages import both_models
from stages.contracts import artifacts as a
from stages.contracts.config import SpecialName
from stages.json_files import write_json
from stages.outcomes import BadInput, GateFailed

IN_CONFIG = ("bos", "eos", "pad")  # roles that the model's own files know by the id
SETTING = "export.override_special_tokens"


def override_special_tokens(
    folder: Path, override: Mapping[SpecialName, str], tokenizer: a.TokenizerFacts, *, source: Path, vocab_size: int
) -> dict[SpecialName, int]:
    """Let a tokenizer and the model's settings beside it have other special tokens.

    Args:
        folder: of the published model.
        override: role, such as eos -> token.
        tokenizer: that of the data.
        source: folder of the base model's tokenizer.
        vocab_size: of the model.

    Returns:
        Role -> id.

    Raises:
        BadInput: the vocabulary has no such token, or text becomes it.
    """
    ids = {role: _id_of(role, token, tokenizer, source, vocab_size) for role, token in override.items()}
    if not ids:
        return {}
    settings = read_json(file) if (file := folder / "tokenizer_config.json").exists() else {}
    before = {role: _text(settings.get(f"{role}_token")) for role in override}
    tokens = {f"{role}_token": token for role, token in override.items()}
    write_json(file, {**settings, **tokens})
    if (file := folder / "special_tokens_map.json").exists():
        write_json(file, {**read_json(file), **tokens})
    if (file := folder / "tokenizer.json").exists():
        content = read_json(file)
        for role, token in override.items():
            _replace(content.get("post_processor"), before[role], token, ids[role])
        write_json(file, content)
    numbers = {f"{role}_token_id": number for role, number in ids.items() if role in IN_CONFIG}
    for name in ("config.json", "generation_config.json"):
        if (file := folder / name).exists() and numbers:
            write_json(file, {**read_json(file), **numbers})
    return ids


def check_special_tokens(folder: Path, ids: Mapping[SpecialName, int], tokenizer: Any, base: Any) -> None:
    """What transformers makes of the folder: tokenizer, config.json and generation must have these ids.

    Args:
        ids: role -> id.
        tokenizer: of transformers, loaded from the folder.
        base: the same, of the base model.

    Raises:
        GateFailed: naming the first that does not.
    """
    transformers = both_models.quiet_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if (folder / "generation_config.json").exists():
        generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        generation = transformers.GenerationConfig.from_model_config(config)
    for role, number in ids.items():
        name = f"{role}_token_id"
        asked = {"the tokenizer": tokenizer} | ({"config.json": config, "generation": generation} if role in IN_CONFIG else {})
        for where, of in asked.items():
            found = getattr(of, name, None)
            if number not in (found if isinstance(found, list) else [found]):
                raise GateFailed(f"{SETTING}.{role} is {number}, but {where} of the exported folder has {name}={found}")
    moved = {getattr(base, f"{role}_token_id"): number for role, number in ids.items()}
    expected = tuple([moved.get(number, number) for number in side] for side in _around(base))
    if (found := _around(tokenizer)) != expected:
        raise GateFailed(
            f"{SETTING}: the exported tokenizer puts the ids {found[0]} before and {found[1]} behind a text, where it should "
            f"{expected[0]} and {expected[1]}: its tokenizer.json adds the base model's special tokens in a way that is not "
            "understood. Leave bos and eos as they are"
        )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text. What it makes of the text is another question, asked elsewhere:
    the base model's may be one that transformers takes for another.
    """
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    first = next((k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare), len(whole))
    return whole[:first], whole[first + len(bare) :]


def _id_of(role: SpecialName, token: str, facts: a.TokenizerFacts, source: Path, vocab_size: int) -> int:
    """The id of a token that a role is to have."""
    added = facts.added_tokens
    number = added[token] if token in added else load_tokenizer(source, facts.kind).id_of(token)
    if number is None:
        raise BadInput(
            f"{SETTING}.{role}: the vocabulary has no token {token!r}: name one that it has, or add it with model.added_tokens"
        )
    if number >= vocab_size:
        raise BadInput(f"{SETTING}.{role}: {token!r} has id {number}, and the model rows for {vocab_size:,} ids only")
    if token not in added:
        try:
            load_tokenizer(source, facts.kind, added_tokens=(*added, token))
        except ValueError as error:
            raise BadInput(f"{SETTING}.{role}: {error}") from error
    return number


def _replace(processor: Any, before: str | None, token: str, number: int) -> None:
    """Let what `tokenizer.json` puts around a text be another token."""
    if not isinstance(processor, dict) or before is None:
        return
    for inner in processor.get("processors", ()):
        _replace(inner, before, token, number)
    if processor.get("type") == "TemplateProcessing" and before in processor["special_tokens"]:
        for part in (*processor["single"], *processor["pair"]):
            if part.get("SpecialToken", {}).get("id") == before:
                part["SpecialToken"]["id"] = token
        del processor["special_tokens"][before]
        processor["special_tokens"][token] = {"id": token, "ids": [number], "tokens": [token]}


def _text(token: Any) -> str | None:
    """A token as text, which may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token
