"""The tokenizer of a published model: the base model's files, with the tokens and the chat template that training added.

`tokenizer.json` lists added tokens among its own; `tokenizer_config.json` names them for tokenizers that are made of
`tokenizer.model` alone. Files in which nothing changes keep their bytes. What transformers makes of the folder must give the
ids that the model is trained with.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_core_impl.data.chat_template import CHATML, REFERENCE_ROLES
from megatron_core_impl.json_files import read_json
from stages import both_models
from stages.contracts import artifacts as a
from stages.contracts.config import SpecialName
from stages.examples import difference, read_examples
from stages.json_files import write_json
from stages.outcomes import GateFailed
from stages.special_tokens import check_special_tokens, override_special_tokens

KIND: dict[str, Any] = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPECIAL = "additional_special_tokens"
SPECIAL_SINCE_5 = "extra_special_tokens"  # transformers' name for the same since 5; where a file has both it reads this one


def write_tokenizer(
    model: a.ModelArtifact,
    source: Path,
    dataset: a.DatasetArtifact,
    data: Path,
    folder: Path,
    *,
    vocab_size: int,
    override: Mapping[SpecialName, str],
    warn: Callable[[str], None],
) -> None:
    """Write the tokenizer that a model trained on a dataset is published with, and prove that it is the data's.

    Args:
        source: the files of the model.
        data: folder of the dataset.
        folder: where the files are written. config.json lies there, and generation_config.json where there is one.
        vocab_size: of the trained model.
        override: special tokens that differ from the model's: role, such as eos -> token.
        warn: told what is amiss with the model's own tokenizer, and can stay so.

    Raises:
        BadInput: the vocabulary lacks a token of `override`.
        GateFailed: transformers does not get the ids of the data from it, or other tokens than the model's and the added ones.
    """
    for name in model.tokenizer_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    added = dataset.tokenizer.added_tokens
    add_tokens(folder, added)
    special = override_special_tokens(folder, override, dataset.tokenizer, source=source, vocab_size=vocab_size)
    if dataset.content == "conversations":
        write_chat_template(folder, dataset.spec["settings"]["chat_template"])
    examples = read_examples(data)
    tokenizer = _load(folder)
    fault = difference(tokenizer, examples)
    for change in (_begin_texts_anew, _be_plain_llama):
        if fault and change(folder):
            tokenizer = _load(folder)
            fault = difference(tokenizer, examples)
    if fault:
        raise GateFailed(
            "who loads this model with transformers would not get the ids that it is trained with, not even with legacy: true "
            f"in tokenizer_config.json: {fault}. transformers takes it for a {type(tokenizer).__name__}. If that is wrong, "
            "name the right tokenizer_class in the model's tokenizer_config.json; or set preprocess.tokenizer to the other "
            f"kind (the data are made with {dataset.tokenizer.kind}), if the model has one"
        )
    check_added_tokens(tokenizer, added)
    base = _load(source)
    check_vocabulary(tokenizer.get_vocab(), base.get_vocab(), added, vocab_size, warn)
    if special:
        check_special_tokens(folder, special, tokenizer, base)


def _load(folder: Path) -> Any:
    return both_models.quiet_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _begin_texts_anew(folder: Path) -> bool:
    """Let what follows a control token begin as a text of its own, with the mark of a word; False if it does so already.

    That is what SentencePiece makes of texts between control tokens, and Meta's and Megatron-LLM's code with it. transformers
    calls it legacy, and does so only where the tokenizer's configuration says it.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    if config.get("legacy") is True:
        return False
    write_json(file, {**config, "legacy": True})
    return True


def _be_plain_llama(folder: Path) -> bool:
    """Let a tokenizer be Llama's that has no class named, or Code Llama's; False if it is another.

    Code Llama's has the same ids for a text, but does not begin texts anew behind control tokens, whatever is configured. What
    is lost is its way of writing prompts for infilling.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    name = str(config.get("tokenizer_class", "CodeLlamaTokenizer"))
    if not name.startswith("CodeLlama"):
        return False
    write_json(file, {**config, "tokenizer_class": name.removeprefix("Code")})
    return True


def add_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """Write special tokens, with their ids, into the files of a tokenizer. Those that are there already become special."""
    if not added:
        return
    listed: list[dict[str, Any]] = []
    if (file := folder / "tokenizer.json").exists():
        content = read_json(file)
        listed = content.setdefault("added_tokens", [])
        known = {token["content"]: token for token in listed}
        new = {token: number for token, number in added.items() if token not in known and token not in _vocabulary(content)}
        plain = [token for token in added if token in known and not known[token].get("special")]
        listed += [{"id": number, "content": token, **KIND} for token, number in sorted(new.items(), key=lambda item: item[1])]
        for token in plain:
            known[token]["special"] = True
        if new or plain:
            write_json(file, content)
    config = read_json(file) if (file := folder / "tokenizer_config.json").exists() else {}
    # Where transformers finds a decoder it takes it for all of them, and gives the others new ids.
    others = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in listed}
    decoder = config.setdefault("added_tokens_decoder", others)
    for token, number in added.items():
        decoder.setdefault(str(number), {"content": token, **KIND})["special"] = True
    _name(config, added)
    write_json(file, config)
    if (file := folder / "special_tokens_map.json").exists():
        special = read_json(file)
        _name(special, added)
        write_json(file, special)


def write_chat_template(folder: Path, name: str) -> None:
    """Give a tokenizer the template that its model was trained with, unless that is its own.

    Args:
        name: as `preprocess.chat_template`.
    """
    if name == "tokenizer":
        return
    template = CHATML
    if name == "megatron-llm":
        roles = ", ".join(f"'{role}': '{called}'" for role, called in REFERENCE_ROLES.items())
        template = CHATML.replace("{{ message.role }}", "{{ {" + roles + "}[message.role] }}").replace(
            "assistant\n", f"{REFERENCE_ROLES['assistant']}\n"
        )
    (folder / "chat_template.jinja").write_text(template)


def check_added_tokens(tokenizer: Any, added: Mapping[str, int]) -> None:
    """Each added token must be one id for transformers too, the one it was trained under.

    Args:
        tokenizer: of transformers, loaded from the exported folder.

    Raises:
        GateFailed: naming the token and both ids.
    """
    for token, number in added.items():
        found = tokenizer(token, add_special_tokens=False).input_ids
        if found[-1:] != [number] or tokenizer.convert_tokens_to_ids(token) != number:
            raise GateFailed(f"the exported tokenizer gives {token} the ids {found}; the model was trained with {number}")


def check_vocabulary(
    published: Mapping[str, int],
    base: Mapping[str, int],
    added: Mapping[str, int],
    vocab_size: int,
    warn: Callable[[str], None],
) -> None:
    """The published tokenizer must have the base model's tokens and those that were added, under their ids, and no others.

    Args:
        published, base: token -> id, as transformers has them.
        vocab_size: rows of the model.
        warn: told of the base model's own tokens that it has no row for.

    Raises:
        GateFailed: naming the first tokens of which that is not true.
    """
    # Whatever lies from the first new id on is in no file of the base model: some of transformers' classes make up tokens.
    first_new = min((number for token, number in added.items() if token not in base), default=None)
    made_up = {token for token, number in base.items() if first_new is not None and number >= first_new}
    expected = {**added, **{token: number for token, number in base.items() if token not in made_up}}
    for fault, tokens in (
        ("has tokens that nobody added", published.keys() - expected.keys() - made_up),
        ("lacks", expected.keys() - published.keys()),
        ("has other ids for", {token for token in expected.keys() & published.keys() if expected[token] != published[token]}),
    ):
        if tokens:
            raise GateFailed(f"the exported tokenizer {fault}: {_listed(tokens, {**expected, **published})}")
    beyond = {token for token, number in published.items() if number >= vocab_size}
    if wrong := beyond & added.keys():
        raise GateFailed(
            f"the exported tokenizer has {_listed(wrong, published)}, and config.json vocab_size={vocab_size}: the model has "
            "no rows for them. Convert with the same model.added_tokens as the data"
        )
    if beyond:
        warn(
            f"the base model's tokenizer has {_listed(beyond, published)}, and its config.json vocab_size={vocab_size}: it has "
            "no rows for them, nor will what is published, and who uses them gets an error. Name them in model.added_tokens: "
            "then they get rows"
        )


def _listed(tokens: Collection[str], ids: Mapping[str, int]) -> str:
    first = sorted(tokens, key=lambda token: ids[token])[:5]
    more = f" and {len(tokens) - 5:,} more" if len(tokens) > 5 else ""
    return ", ".join(f"{token} = {ids[token]}" for token in first) + more


def _name(content: dict[str, Any], added: Mapping[str, int]) -> None:
    """Add tokens to those that a file calls special, which may be written as text or as objects."""
    since_5 = content.get(SPECIAL_SINCE_5)
    listed = since_5 if since_5 and isinstance(since_5, list) else content.setdefault(SPECIAL, [])
    known = {token["content"] if isinstance(token, dict) else token for token in listed}
    listed += [token for token in added if token not in known]


def _vocabulary(content: dict[str, Any]) -> Mapping[str, Any]:
    vocabulary = content.get("model", {}).get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else dict(vocabulary)  # Unigram: pairs of piece and score
