"""What is known to be wrong before any stage starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_core_impl.models import families
from stages.contracts import memory, words
from stages.contracts.config import PipelineConfig
from stages.contracts.preflight import check, memory_of
from stages.contracts.train_settings import LayoutSettings, TrainSettings

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


def problems(folder: Path, **changes: Any) -> list[str]:
    base: dict[str, Any] = {
        "model": {"source": str(folder)},
        "data": {"source": "c/d"},
        "train": {"steps": 10, "sequence_length": 512},
    }
    return check(PipelineConfig.model_validate(base | changes))


def model(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_nothing_is_wrong(tmp_path: Path) -> None:
    assert problems(model(tmp_path, LLAMA)) == []
    assert problems(Path("some/hub-id"), layout={"tp": 64}) == [], "what is on the Hub is known once it is here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "config.json: is no JSON object"),
        (LLAMA | {"model_type": "bert"}, "model_type='bert' is not supported. Supported: falcon, llama, mistral, qwen2"),
        (LLAMA | {"hidden_size": "abc"}, "config.json: hidden_size='abc' must be a whole number"),
        (LLAMA | {"rms_norm_eps": "x"}, "config.json: rms_norm_eps='x' must be a finite number"),
        (LLAMA | {"rope_parameters": 3}, "config.json: rope_parameters=3 must be an object"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=8"),
    ],
)
def test_a_model_that_is_none(tmp_path: Path, content: Any, message: str) -> None:
    (problem,) = problems(model(tmp_path, content))
    assert problem.startswith("model.source: ")
    assert message in problem


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"model.source: {tmp_path} has no config.json, so it is no Hugging Face model folder; nor")
    (tmp_path / "config.json").mkdir()
    assert problems(tmp_path) == [f"model.source: {tmp_path}/config.json cannot be read: Is a directory"]


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    found = problems(model(tmp_path, LLAMA), layout={"tp": 16}, train={"steps": 10, "sequence_length": 1024})
    assert found == [
        "layout: tp=16 cannot share out num_attention_heads=8 with num_key_value_heads=4 and intermediate_size=96. "
        "Legal here: 1, 2, 4, 8",
        f"train.sequence_length: 1024 exceeds max_position_embeddings=512 of {tmp_path}",
    ]


def test_a_folder_to_push_to_that_is_taken(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    push = {"to": "folder", "folder": str(shelf)}
    shelf.mkdir()
    assert problems(Path("some/hub-id"), push=push) == []
    (shelf / "diary.txt").write_text("dear diary")
    assert problems(Path("some/hub-id"), push=push) == [
        f"push.folder: {shelf} holds something else than an earlier push: diary.txt. Name another folder, or empty it"
    ]
    (shelf / "README.md").write_text("---\ntags:\n- megatron-flows\n---\n")
    assert problems(Path("some/hub-id"), push=push) == []


def test_memory_of_a_local_model(tmp_path: Path) -> None:
    def told(source: str, **layout: int) -> str | None:
        train = {"steps": 10, "sequence_length": 512, "precision": "fp32"}
        base = {"model": {"source": source}, "data": {"source": "c/d"}, "train": train, "layout": layout}
        return memory_of(PipelineConfig.model_validate(base), None)

    folder = str(model(tmp_path, LLAMA))
    # a layer: q and o, k and v, the MLP, norms; embedding and output layer, padded to 384 rows; a norm
    numbers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 2 * 384 * 64 + 64
    text = told(folder)
    assert text is not None
    assert (
        f"= weights {words.size(4 * numbers)} + main gradients {words.size(4 * numbers)} + moments {words.size(8 * numbers)}"
        in text
    )
    assert "masters" not in text, "there are none in fp32"
    assert told(folder, tp=16) is None, "it does not fit; `check` says why"
    assert told("some/hub-id") is None
    (tmp_path / "config.json").write_text("[]")
    assert told(folder) is None


SEVEN_BILLION = LLAMA | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"micro_batch_size": 4}, "Then lower train.micro_batch_size (now 4), or set train.recompute to full (now none), or "
         "raise layout.tp (now 1) or layout.pp (now 1)"),
        ({"recompute": "full"}, "Then raise layout.tp (now 1) or layout.pp (now 1)"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_too_small(settings: dict[str, Any], advice: str) -> None:
    train, layout = TrainSettings(steps=1, **settings), LayoutSettings()
    found = memory.expected(families.config_from_hf(SEVEN_BILLION), layout, train)
    assert 18 * 6.7e9 < found.total < 18 * 6.7e9 + 40e9, "18 bytes a number, and activations"
    text = memory.shortage(found, 80 * 10**9, layout, train)
    assert (
        text == f"needs about {words.size(found.total)}, and its GPU has 80.0 GB: it will probably run out of memory. {advice}"
    )
    assert memory.shortage(found, found.total, layout, train) is None
    with_tp = LayoutSettings(tp=8)
    assert memory.expected(families.config_from_hf(SEVEN_BILLION), with_tp, train).total < found.total / 4
