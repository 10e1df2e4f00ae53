"""Conversations with added tokens through every stage but training: the vocabulary grows, and all agree on its ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspaces import STEP, publish, references, small, write_model, write_weights

from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.data.instruction_dataset import Conversations, Reading
from stages import convert, download, export, preprocess, runtime, verify
from stages.answers import Question, _question, answers, exact, held_out
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import specs
from stages.contracts.data_settings import DataSettings
from stages.outcomes import BadInput, GateFailed
from stages.tokenizer_files import check_added_tokens

ADDED = ("<|im_start|>", "<|im_end|>")
ROWS = 400  # of the base model


def conversation(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def stages_until_verify(
    root: Path, tokenizer: str, lines: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Artifacts by stage, all made by the stages themselves."""
    root.mkdir(exist_ok=True)
    write_model(root / "source", tokenizer=tokenizer)
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out or lines[:6]))
    config = c.PipelineConfig.model_validate({
        "workspace": str(root / "ws"), "model": {"source": str(root / "source"), "added_tokens": ADDED},
        "data": {"source": str(root / "train.jsonl"), "format": "messages",
                 "valid": [{"source": str(root / "valid.jsonl"), "format": "messages"}]},
        "preprocess": {"chat_template": "chatml", "workers": 1, "tokenizer": tokenizer}, "train": {"steps": STEP},
        "verify": small({}), "export": {"answers": 6},
    })  # fmt: skip
    made: dict[str, Any] = {}
    made["model"] = runtime.execute(specs.DownloadModelSpec.of(config), download.run)
    made["data"] = runtime.execute(specs.DownloadDataSpec.of(config), download.run)
    made["dataset"] = runtime.execute(specs.PreprocessSpec.of(config, data=made["data"], model=made["model"]), preprocess.run)
    made["weights"] = runtime.execute(specs.ConvertSpec.of(config, model=made["model"]), convert.run)
    inputs = {name: made[name] for name in ("model", "weights", "dataset")}
    made["verification"] = runtime.execute(specs.VerifySpec.of(config, **inputs), verify.run)
    return made | {"config": config, "root": root / "ws"}


def trained(made: dict[str, Any]) -> dict[str, a.Artifact]:
    """A checkpoint without content, as if training had moved nothing, and what merge makes of it."""
    config, weights, dataset = made["config"], made["weights"], made["dataset"]
    checkpoint = publish(
        specs.TrainSpec.of(config, weights=weights, dataset=dataset), a.CheckpointArtifact,
        {"checkpoints/step-000007/state.json": b"{}"}, model=weights.model, tokenizer=dataset.tokenizer,
        checkpoint="checkpoints/step-000007", step=STEP, consumed_samples=56, consumed_tokens=57344, tp=1, pp=1, dp=1,
        loss_before=5.5, loss_after=2.25,
    )  # fmt: skip
    reader = open_weights(weights.folder(made["root"]))
    tensors = {name: reader.read(name) for name in reader.names}
    merge_spec = specs.MergeSpec(workspace=config.workspace, inputs=references({"checkpoint": checkpoint}))
    return {"checkpoint": checkpoint, "weights": write_weights(merge_spec, tensors, weights.model, trained_steps=STEP)}


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "huggingface"])
def test_all_stages_agree_on_the_vocabulary(tmp_path: Path, tokenizer: str) -> None:
    plain = [conversation(f"def f{n}(x): #", f"return x + {n}", "and?", "class A: pass") for n in range(3)]
    lines = [conversation(f"def f{n}(x): # <|im_end|>", f"return x + {n}", "and?", "class A: pass") for n in range(40)]
    made = stages_until_verify(tmp_path, tokenizer, lines, plain)
    dataset, weights = made["dataset"], made["weights"]
    assert dataset.tokenizer.added_tokens == {token: ROWS + n for n, token in enumerate(ADDED)}
    assert (dataset.content, [each.name for each in dataset.sets]) == ("conversations", ["data", "valid-0"])
    assert not list(dataset.folder(made["root"]).glob("*-weight*")), "no message has a weight"
    text, held = (
        Conversations(dataset.folder(made["root"]) / name, Reading(sequence_length=999)) for name in ("data", "valid-0")
    )
    for number in range(len(text)):
        ids = text.tokens(number).tolist()
        assert (ids.count(ROWS), ids.count(ROWS + 1)) == (4, 4), "what a message spells is text"

    # The new rows are the mean of the old, and the gate let them pass.
    assert weights.model.vocab_size == ROWS + 2
    assert weights.figure.endswith("bit for bit, and 2 rows for added tokens")
    table = open_weights(weights.folder(made["root"])).read("lm_head.weight")
    assert torch.equal(table[ROWS:], table[:ROWS].double().mean(0).float().expand(2, -1))
    assert made["verification"].mean_error < 1e-5

    inputs = {"model": made["model"], "dataset": dataset, **trained(made)}
    spec = specs.ExportSpec(
        workspace=made["config"].workspace, inputs=references(inputs), settings=c.ExportSettings(answers=6),
        verify=c.VerifySettings(**small({})),
    )  # fmt: skip
    exported = runtime.execute(spec, export.run)
    folder = exported.folder(made["root"]) / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == ROWS + 2
    theirs, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "source")
    check_added_tokens(theirs, dataset.tokenizer.added_tokens)
    assert len(theirs) == len(base) + 2, "exactly the tokens that were added"
    assert theirs("def f(x):").input_ids == base("def f(x):").input_ids
    said = theirs.apply_chat_template(lines[0]["messages"], tokenize=False)
    assert said.startswith(
        "<|im_start|>user\ndef f0(x): # <|im_end|><|im_end|>\n<|im_start|>assistant\nreturn x + 0<|im_end|>\n"
    )
    # Who loads the folder gets the ids that were trained, and answers that end.
    for number, line in enumerate(plain):
        assert theirs.apply_chat_template(line["messages"])["input_ids"] == held.tokens(number).tolist()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, ROWS + 1]
    with pytest.raises(GateFailed, match=r"gives <\|im_start\|> the ids \[.*\]; the model was trained with 7"):
        check_added_tokens(theirs, {"<|im_start|>": 7})
    right = exported.metrics["answers"]
    assert (right["questions"], right["before"]) == (3, right["after"]), "the same weights say the same"
    first = json.loads((folder.parent / "answers.json").read_text())[0]
    assert first["answer"].startswith("class A: pass")
    assert first["question"].endswith("assistant\n")


def test_answers_are_compared_token_by_token() -> None:
    questions = [Question([1, 2], [3, 4]), Question([1], [5]), Question([2], [6, 7])]
    assert exact([[3, 4], [4], [6, 7]], questions) == pytest.approx(2 / 3)
    assert exact([[3, 9], [4], [6]], questions) == 0
    assert exact([[3, 4, 2], [6], [6]], questions) == pytest.approx(1 / 3), "where nothing ends an answer, the model goes on"


@pytest.mark.parametrize(
    ("roles", "ids", "header", "answer"),
    [
        ([1, 1, 2, 2], [5, 6, 7, 9], 0, ([5, 6], [7, 9])),
        ([1, 1, 2, 2, 1], [5, 6, 7, 9, 4], 0, ([5, 6], [7, 9])),  # a newline behind the answer
        ([1, 1, 2, 1, 1], [5, 6, 7, 9, 4], 0, ([5, 6], [7, 9])),  # the end is not in what the template calls the answer
        ([1, 2, 2, 2, 2], [5, 3, 7, 9, 4], 1, ([5, 3], [7, 9])),  # a header, and a newline behind the end
        ([1, 2, 1, 2, 1], [5, 7, 6, 8, 4], 0, ([5, 7, 6], [8])),
        ([1, 1], [5, 6], 0, None),
        ([2, 2], [5, 6], 0, None),
    ],
)
def test_the_last_answer_is_found(
    roles: list[int], ids: list[int], header: int, answer: tuple[list[int], list[int]] | None
) -> None:
    found = _question(np.array(ids), np.array(roles), header, 9)
    assert (None if found is None else tuple(found)) == answer


def test_an_answer_may_end_with_the_end_of_text(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    [[best, second]] = answers(model, [Question([5, 6, 7], [0])], longest=2)
    assert best != second
    model.generation_config.eos_token_id = best
    assert answers(model, [Question([5, 6, 7], [best])], longest=2) == [[best]]


def test_what_conversations_cannot_do_is_said(tmp_path: Path) -> None:
    lines = [conversation("q", "a"), {"messages": [{"role": "user", "content": "no answer"}]}, {"text": "none"}]
    with pytest.raises(BadInput, match=r"2 of the 3 lines of train\.jsonl are malformed") as caught:
        stages_until_verify(tmp_path / "malformed", "sentencepiece", lines)
    assert "no assistant" in str(caught.value) or "messages" in str(caught.value)
    with pytest.raises(ValueError, match="the sources hold text and conversations; a model is trained on one of them"):
        DataSettings.model_validate({"source": "a", "format": "alpaca", "valid": [{"source": "b"}]})
    with pytest.raises(ValueError, match="columns names 'text', which format alpaca does not have"):
        DataSettings.model_validate({"source": "a", "format": "alpaca", "columns": {"text": "t"}})


def test_held_out_questions_are_those_of_the_split(tmp_path: Path) -> None:
    lines = [conversation(f"what comes after {n}", str(n + 1)) for n in range(30)]
    made = stages_until_verify(tmp_path, "sentencepiece", lines)
    folder = made["dataset"].folder(made["root"])
    all_sets = made["dataset"].model_copy(
        update={"sets": (made["dataset"].sets[0].model_copy(update={"role": "all"}),)}
    )  # fmt: skip

    def found(dataset: a.DatasetArtifact, **changes: Any) -> list[Question]:
        return held_out(dataset, folder, **{"split": "8,2,0", "seed": 1, "count": 99, "longest": 48, "context": 128} | changes)

    assert len(found(all_sets)) == 6
    assert len(found(made["dataset"], count=4)) == 4, "of the set that is held out"
    end = made["dataset"].end_of_answer
    assert end == made["dataset"].tokenizer.added_tokens["<|im_end|>"]
    assert {question.answer[-1] for question in found(all_sets)} == {end}, "not the newline behind it"
    longest = max(len(question.answer) for question in found(all_sets))
    assert 0 < len(found(all_sets, longest=longest - 1)) < 6
    assert found(all_sets, context=20) == [], "no room for question and answer"
