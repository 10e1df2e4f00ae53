"""What is known to be wrong before any stage starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.contracts.config import PipelineConfig
from stages.contracts.preflight import check

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
        (LLAMA | {"rms_norm_eps": "x"}, "config.json: rms_norm_eps='x' must be a number"),
        (LLAMA | {"rope_parameters": 3}, "config.json: rope_parameters=3 must be an object"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=8"),
    ],
)
def test_a_model_that_is_none(tmp_path: Path, content: Any, message: str) -> None:
    (problem,) = problems(model(tmp_path, content))
    assert problem.startswith("model.source: ")
    assert message in problem


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"model.source: {tmp_path} has no config.json, so it is no Hugging Face model folder"]
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
