"""New tokens and special tokens through the stages: rows, ids, and what is published of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from workspaces import STEP, publish, references, small, text, write_model, write_weights

from megatron_core_impl.checkpoint.sharded import open_weights
from stages import convert, download, export, preprocess, runtime, train, verify
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import specs
from stages.outcomes import BadInput, GateFailed
from stages.tokenizer_files import check_vocabulary

ADDED = ("<|sep|>", "<|im_end|>")
ROWS = 400  # of the base model
FALCON = {
    "model_type": "falcon", "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False,
    "alibi": False, "tie_word_embeddings": True, "tokenizer": "huggingface",
}  # fmt: skip


class Chain:
    """The stages from a model and some text to a published model, without training, made as far as they are asked for."""

    def __init__(self, root: Path, *, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> None:
        self.root = root
        if not (root / "source").exists():
            write_model(root / "source", **(model or {}))
            (root / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text().split("\n\n\n")[:40]))
        settings = {"source": str(root / "source"), "added_tokens": ADDED, **sections.pop("model_settings", {})}
        self.config = c.PipelineConfig.model_validate({
            "workspace": str(root / "ws"), "model": settings, "data": {"source": str(root / "text.jsonl")},
            "preprocess": {"workers": 1}, "train": {"steps": STEP}, "verify": small({}), **sections,
        })  # fmt: skip
        self.model = self._make(specs.DownloadModelSpec.of(self.config), download.run)
        data = self._make(specs.DownloadDataSpec.of(self.config), download.run)
        self.dataset = self._make(specs.PreprocessSpec.of(self.config, data=data, model=self.model), preprocess.run)
        self.weights = self._make(specs.ConvertSpec.of(self.config, model=self.model), convert.run)

    def _make(self, spec: specs.Spec, run: Any) -> Any:
        return runtime.execute(spec, run)

    def verified(self) -> a.VerificationArtifact:
        inputs = {"model": self.model, "weights": self.weights, "dataset": self.dataset}
        artifact: a.VerificationArtifact = self._make(specs.VerifySpec.of(self.config, **inputs), verify.run)
        return artifact

    def exported(self) -> Path:
        """The folder that would be published after a training that moved nothing."""
        weights, dataset = self.weights, self.dataset
        checkpoint = publish(
            specs.TrainSpec.of(self.config, weights=weights, dataset=dataset), a.CheckpointArtifact,
            {"checkpoints/step-000007/state.json": b"{}"}, model=weights.model, tokenizer=dataset.tokenizer,
            checkpoint="checkpoints/step-000007", step=STEP, consumed_samples=56, consumed_tokens=57344, tp=1, pp=1, dp=1,
            loss_before=5.5, loss_after=2.25,
        )  # fmt: skip
        reader = open_weights(weights.folder(self.root / "ws"))
        tensors = {name: reader.read(name) for name in reader.names}
        merge_spec = specs.MergeSpec(workspace=self.config.workspace, inputs=references({"checkpoint": checkpoint}))
        merged = write_weights(merge_spec, tensors, weights.model, trained_steps=STEP)
        inputs = {"model": self.model, "weights": merged, "dataset": dataset, "checkpoint": checkpoint}
        artifact = self._make(specs.ExportSpec.of(self.config, **inputs), export.run)
        return Path(artifact.folder(self.root / "ws") / "model")


# ── New rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("mean", {}),
        ("zeros", {"tie_word_embeddings": True}),
        ("last", {"dtype": "bfloat16"}),
        ("normal", {}),
        ("normal", FALCON),  # transformers calls its embedding otherwise than we do: it must get the same draws
    ],
    ids=str,
)
def test_rows_of_added_tokens(tmp_path: Path, kind: str, model: dict[str, Any]) -> None:
    chain = Chain(tmp_path, model=model, model_settings={"new_rows": kind})
    facts = chain.weights.model
    assert (facts.vocab_size, facts.added_tokens, facts.new_rows) == (ROWS + 2, {"<|sep|>": 400, "<|im_end|>": 401}, kind)
    reader = open_weights(chain.weights.folder(tmp_path / "ws"))
    names = ["model.embed_tokens.weight"] + ([] if facts.tie_word_embeddings else ["lm_head.weight"])
    tables = [reader.read(name) for name in names]
    for table in tables:
        old, new = table[:ROWS], table[ROWS:]
        if kind == "normal":
            assert not torch.equal(new[0], new[1])
            assert (new.double().mean(1) - old.double().mean()).abs().max() < 5 * old.std() / 64**0.5
        else:
            mean = old.double().mean(0).to(old.dtype)
            assert torch.equal(new, {"mean": mean, "zeros": torch.zeros_like(mean), "last": old[-1]}[kind].expand(2, -1))
    assert chain.verified().mean_error < 1e-5, "transformers' model was grown to the same rows"


def test_a_model_that_has_the_tokens_gets_no_rows(tmp_path: Path) -> None:
    chain = Chain(tmp_path, model_settings={"added_tokens": ["</s>"]})
    facts = chain.weights.model
    assert (facts.vocab_size, facts.added_tokens, facts.new_rows) == (ROWS, {"</s>": 2}, None)
    assert "row" not in chain.weights.figure


def test_data_and_weights_of_other_tokens_do_not_meet(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    other = Chain(tmp_path, model_settings={"added_tokens": ADDED[::-1]})
    chain.weights = other.weights
    told = (
        r"the data are made with the added tokens <\|sep\|> = 400, <\|im_end\|> = 401, the weights with the added tokens "
        r"<\|im_end\|> = 400, <\|sep\|> = 401: give preprocess and convert the same added_tokens, in the same order"
    )
    with pytest.raises(BadInput, match=told):
        chain.verified()
    with pytest.raises(BadInput, match=told):
        chain.exported()
    spec = specs.TrainSpec.of(chain.config, weights=chain.weights, dataset=chain.dataset)
    with pytest.raises(BadInput, match=told):
        train.check(spec, chain.weights, chain.dataset)
    none = Chain(tmp_path, model_settings={"added_tokens": []})
    chain.dataset = none.dataset
    with pytest.raises(BadInput, match=r"the data are made with no added tokens, the weights with the added tokens"):
        chain.verified()


# ── What is published ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "huggingface"])
def test_published_vocabulary(tmp_path: Path, tokenizer: str) -> None:
    """Tokenizer, config.json and the list of added tokens say the same."""
    folder = Chain(tmp_path, model={"tokenizer": tokenizer}).exported()
    theirs, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "source")
    assert len(theirs) == len(base) + 2 == json.loads((folder / "config.json").read_text())["vocab_size"] == ROWS + 2
    assert theirs.get_vocab() == base.get_vocab() | {"<|sep|>": 400, "<|im_end|>": 401}


BASE = {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("published", "rows", "message"),
    [
        (BASE | {"<x>": 2, "<pad>": 3}, 4, r"has tokens that nobody added: <pad> = 3$"),
        ({"a": 0, "<x>": 2}, 3, r"lacks: b = 1$"),
        ({"a": 1, "b": 0, "<x>": 2}, 3, r"has other ids for: b = 0, a = 1$|has other ids for: a = 0, b = 1$"),
        (BASE | {"<x>": 2}, 2, r"has <x> = 2, and config.json vocab_size=2: the model has no rows for them"),
    ],
)
def test_another_vocabulary_is_not_published(published: dict[str, int], rows: int, message: str) -> None:
    with pytest.raises(GateFailed, match=message):
        check_vocabulary(published, BASE, {"<x>": 2}, rows, warn=pytest.fail)


def test_tokens_that_transformers_makes_up_give_way_to_those_that_are_added() -> None:
    """Code Llama's class adds <FILL_ME>, which is in no file of the model, under the id that the next token gets."""
    base = BASE | {"<FILL_ME>": 2}
    check_vocabulary(BASE | {"<x>": 2}, base, {"<x>": 2}, 3, warn=pytest.fail)
    told: list[str] = []
    check_vocabulary(BASE | {"<x>": 2, "<FILL_ME>": 3}, base, {"<x>": 2}, 3, told.append)
    assert "tokenizer has <FILL_ME> = 3" in told[0]
    with pytest.raises(GateFailed, match=r"has other ids for: <FILL_ME> = 3$"):
        check_vocabulary(BASE | {"<FILL_ME>": 3}, base, {}, 4, warn=pytest.fail)


def test_tokens_without_a_row_in_the_base_model_are_told() -> None:
    told: list[str] = []
    base = BASE | {"<pad>": 2}
    check_vocabulary(base, base, {}, 2, told.append)
    (text,) = told
    assert "tokenizer has <pad> = 2, and its config.json vocab_size=2: it has no rows for them" in text
    check_vocabulary(base, base, {"<pad>": 2}, 3, warn=pytest.fail)  # named in model.added_tokens, it has one


# ── Special tokens ────────────────────────────────────────────────────────────────────────────────────────────────────


class Always(LogitsProcessor):
    """Lets a model write one token only."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -1.0).index_fill_(1, torch.tensor([self.token]), 1.0)


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "huggingface"])
def test_override_special_tokens(tmp_path: Path, tokenizer: str) -> None:
    override = {"eos": "<|im_end|>", "pad": "</s>", "sep": "<|sep|>", "bos": "<|sep|>"}
    chain = Chain(tmp_path, model={"tokenizer": tokenizer}, export={"override_special_tokens": override})
    chain.verified()
    folder = chain.exported()
    theirs = AutoTokenizer.from_pretrained(folder)
    end, pad = 401, theirs.convert_tokens_to_ids("</s>")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.sep_token_id, theirs.bos_token_id) == (end, pad, 400, 400)
    assert len(theirs) == ROWS + 2
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (end, pad, 400)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id in (end, [end])
    assert (model.generation_config.pad_token_id, model.generation_config.bos_token_id) == (pad, 400)
    prompt = theirs("def f(x):", return_tensors="pt")
    for token, length in ((end, 1), (5, 8)):
        written = model.generate(**prompt, do_sample=False, max_new_tokens=8, logits_processor=[Always(token)])
        assert written.shape[1] - prompt.input_ids.shape[1] == length, "generation ends at the new end, and there only"
    batch = theirs(["def f(x):", "x"], padding=True)
    assert pad in batch.input_ids[1]
    base = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert theirs("def f(x):").input_ids == base("def f(x):").input_ids


def test_what_is_put_around_a_text_follows(tmp_path: Path) -> None:
    """A tokenizer.json that begins texts with <s> begins them with the token that is bos from now on."""
    write_model(tmp_path / "source", tokenizer="huggingface")
    file = tmp_path / "source" / "tokenizer.json"
    content = json.loads(file.read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(content))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text().split("\n\n\n")[:40]))
    assert AutoTokenizer.from_pretrained(tmp_path / "source")("a").input_ids[0] == 0
    folder = Chain(tmp_path, export={"override_special_tokens": {"bos": "<|sep|>"}}).exported()
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 400


def test_a_tokenizer_that_transformers_takes_for_another(tmp_path: Path) -> None:
    """Of tokenizer.model alone transformers makes Code Llama's, which begins no text with a space: what is published is mended,
    and its special tokens are compared by what stands around a text, not by the text.
    """
    source = tmp_path / "source"
    write_model(source)
    for path in (*source.glob("tokenizer*"), *source.glob("special*")):
        if path.name != "tokenizer.model":
            path.unlink()
    documents = [
        {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": part[::-1]}]}
        for part in text().split("\n\n\n")[:40]
        if part.strip()
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    chain = Chain(
        tmp_path, model_settings={"added_tokens": ["<|im_start|>", "<|im_end|>"]},
        data={"source": str(tmp_path / "text.jsonl"), "format": "messages"},
        preprocess={"workers": 1, "chat_template": "chatml"}, export={"override_special_tokens": {"eos": "<|im_end|>"}},
    )  # fmt: skip
    pieces = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(source)
    assert theirs("a", add_special_tokens=False).input_ids == [pieces.piece_to_id("a")], "the trap is there"
    theirs = AutoTokenizer.from_pretrained(chain.exported())
    assert (theirs.eos_token_id, theirs("a", add_special_tokens=False).input_ids) == (401, [pieces.piece_to_id("▁a")])


def test_what_megatron_llm_cannot_hold_is_refused_before_training(tmp_path: Path) -> None:
    """A model from the Hub is known only now."""
    chain = Chain(tmp_path, export={"megatron_llm": {"pp": 2}})
    with pytest.raises(BadInput, match=r"^export\.megatron_llm: pp=2 does not divide num_hidden_layers=3"):
        chain.verified()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|im_ned|>", r"eos: the vocabulary has no token '<\|im_ned\|>': name one that it has, or add it with model\.added"),
        ("e", r"eos: added token 'e' is an ordinary piece of the vocabulary, id \d+, which any text that holds it becomes"),
    ],
)
def test_tokens_that_cannot_be_special_are_refused_before_training(tmp_path: Path, token: str, message: str) -> None:
    chain = Chain(tmp_path, export={"override_special_tokens": {"eos": token}})
    with pytest.raises(BadInput, match=rf"^export\.override_special_tokens\.{message}"):
        chain.verified()
