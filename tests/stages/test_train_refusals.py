"""What the train stage refuses before any worker starts, and what it says then."""

from pathlib import Path
from typing import Any

import pytest
from train_inputs import cut_spec, put_conversations, put_dataset, put_weights, spec_of

from stages import runtime, torchrun, train
from stages.contracts.specs import TrainSpec
from stages.outcomes import BadInput


def refusal(spec: TrainSpec) -> str:
    with pytest.raises(BadInput) as error:
        runtime.execute(spec, train.run, resumable=True)
    return str(error.value)


@pytest.fixture(autouse=True)
def no_workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(torchrun, "run_workers", refuse)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    text = refusal(spec_of(tmp_path, dataset=put_dataset(tmp_path, vocab_size=64)))
    assert "dataset.tokenizer.vocab_size=64, but weights.model.vocab_size=61" in text
    assert "Preprocess the text with the tokenizer of this model" in text


def test_weights_cut_for_another_layout(tmp_path: Path) -> None:
    text = refusal(spec_of(tmp_path, tp=2, weights=put_weights(tmp_path, tp=1)))
    assert text == "layout.tp=2, but weights.tp=1: run the shard stage with tp=2, or set layout.tp to 1"

    text = refusal(spec_of(tmp_path, pp=2, vpp=2, weights=put_weights(tmp_path, pp=2)))
    assert text == "layout.vpp=2, but weights.vpp=1: run the shard stage with vpp=2, or set layout.vpp to 1"


def test_layout_that_cannot_hold_the_model(tmp_path: Path) -> None:
    text = refusal(spec_of(tmp_path, tp=8))
    assert "layout: tp=8 cannot share out num_attention_heads=4 with num_key_value_heads=2" in text
    assert text.endswith("Legal here: 1, 2, 4")
    assert refusal(spec_of(tmp_path, pp=3)) == "layout: pp=3 exceeds num_hidden_layers=2. Legal here: 1 to 2"


def test_documents_without_an_end(tmp_path: Path) -> None:
    text = refusal(spec_of(tmp_path, reset_attention_mask=True, eod_mask_loss=True))
    assert text == (
        "train.reset_attention_mask and train.eod_mask_loss need a token at the end of each document, but "
        "dataset.bos_eos=none: preprocess the text with preprocess.bos_eos=eos, or leave them out"
    )
    assert train.check(*inputs_of(tmp_path, reset_attention_mask=True)) is None


def inputs_of(workspace: Path, **settings: Any) -> tuple[TrainSpec, Any, Any]:
    """A spec whose documents have ends, and its inputs."""
    weights, dataset = put_weights(workspace), put_dataset(workspace, bos_eos="eos")
    return spec_of(workspace, weights=weights, dataset=dataset, **settings), weights, dataset


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sequence_length": 64}, "train.sequence_length=64 exceeds weights.model.max_position_embeddings=32"),
        ({"split": "100,0.001,0"}, 'train.split="100,0.001,0" gives the valid split 0 of 40 documents with 0 tokens, and one '
         'sample needs 17. Set train.split to "95,5,0", or lower train.sequence_length (now 16)'),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    assert text in refusal(spec_of(tmp_path, **settings))


def test_too_little_text(tmp_path: Path) -> None:
    text = refusal(spec_of(tmp_path, dataset=put_dataset(tmp_path, documents=1), split="1,1,0"))
    assert "one sample needs 17. Give more text, or lower train.sequence_length" in text


def test_conversations_of_which_nothing_is_left(tmp_path: Path) -> None:
    dataset = put_conversations(tmp_path, [40] * 10)
    assert refusal(spec_of(tmp_path, dataset=dataset, too_long="drop")) == (
        "train: no dataset has a conversation left for train: of the 8 that data has for it, all are too long and left out "
        "(the longest of the set has 40 tokens, sequence_length + 1 is 17): raise sequence_length, or set too_long to "
        '"truncate"'
    )


def test_a_missing_file(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    file = tmp_path / spec.inputs["weights"].path / "rank-0000.safetensors"
    file.unlink()
    assert f"inputs.weights: {file}: missing" in refusal(spec)


def test_shards_that_are_not_what_the_spec_says(tmp_path: Path) -> None:
    spec = cut_spec(tmp_path)
    ref = spec.inputs["weights"].model_copy(update={"content": "other"})
    other = spec.model_copy(update={"inputs": {**spec.inputs, "weights": ref}})
    assert "does not hold content other: leave that out of the spec" in refusal(other)
