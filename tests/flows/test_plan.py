"""What a run would do, and why."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_stages import MAKES, config, make_results

from flows import cli
from flows.asked import plan
from flows.asked.load_config import BadConfig, check_ready
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import SPECS


def states(plans: list[plan.NodePlan]) -> dict[str, tuple[str, str]]:
    return {p.node: (p.state, p.why) for p in plans}


def test_nothing_there(tmp_path: Path) -> None:
    found = states(plan.plan(config(tmp_path)))
    assert found["download-model"] == ("run", "has not run in this workspace")
    assert found["train"] == ("run", "needs preprocess and shard, which run first")
    assert not list(tmp_path.iterdir())


def test_everything_there_then_another_learning_rate(tmp_path: Path) -> None:
    make_results(config(tmp_path))
    assert {state for state, _ in states(plan.plan(config(tmp_path))).values()} == {"cached"}
    assert "everything is cached: a run takes seconds" in plan.report(config(tmp_path))
    found = states(plan.plan(config(tmp_path, lr=1e-4)))
    assert [node for node, (state, _) in found.items() if state == "run"] == ["train", "merge", "export", "push"]
    assert found["train"][1] == "differs from the nearest earlier result: train.lr 0.0003 → 0.0001"
    assert found["merge"][1] == "needs train, which runs first"


def test_settings_that_do_not_change_the_result(tmp_path: Path) -> None:
    make_results(config(tmp_path))
    assert states(plan.plan(config(tmp_path, log_interval=1)))["train"][0] == "cached"


def test_a_damaged_result_and_an_unfinished_one(tmp_path: Path) -> None:
    made = make_results(config(tmp_path))
    (made["convert"].folder(tmp_path) / "content.txt").write_text("tampered!")
    found = states(plan.plan(config(tmp_path)))
    assert found["convert"][0] == "run"
    assert found["convert"][1].startswith(f"its result is damaged: {made['convert'].folder(tmp_path)}/content.txt: has 9 bytes")
    assert found["preprocess"][0] == "cached"

    partial = (
        tmp_path
        / "train"
        / f".{SPECS['train'].of(config(tmp_path, lr=1e-5), weights=made['shard'], dataset=made['preprocess']).key}.partial"
    )
    for step in ("step-999999", "step-1000000", "step-2000000.tmp"):
        (partial / "checkpoints" / step).mkdir(parents=True)
        (partial / "checkpoints" / step / "state.json").touch()
    made = make_results(config(tmp_path))  # mends convert
    assert states(plan.plan(config(tmp_path, lr=1e-5)))["train"][1] == "goes on from checkpoint step-1000000"


def test_words_of_others_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, made = tmp_path / "mine.yaml", make_results(config(tmp_path))
    file.write_text(json.dumps(config(tmp_path).model_dump(mode="json")))
    told = made["convert"].folder(tmp_path) / a.ARTIFACT_FILE
    told.write_text(told.read_text().replace('"convert made"', '"made \\u001b[2J"'))
    assert cli.main(["plan", str(file)]) == 0
    assert "  convert         cached  made  [2J\n" in capsys.readouterr().out


def test_the_report_says_what_is_asked_for(tmp_path: Path) -> None:
    make_results(config(tmp_path))
    report = plan.report(config(tmp_path, steps=512))
    assert "somebody/model · 1.23 K parameters · vocabulary 64 · trained in bf16" in report
    assert "1 process = dp 1 × tp 1 × pp 1 · micro batch 1 · global batch 8 (8 micro batches)" in report
    assert "memory     each GPU 71.7 kB = weights 5.3 kB + main gradients 10.6 kB + " in report
    assert "512 steps × 8 × 16 = 65.5 K tokens = 16.5 epochs" in report
    assert "4 to run, 6 cached" in report


def test_a_source_in_a_list_is_named(tmp_path: Path) -> None:
    def blended(**second: Any) -> PipelineConfig:
        blend = [{"source": "a/b"}, {"source": "c/d", "weight": 2, **second}]
        return PipelineConfig.model_validate({**config(tmp_path).model_dump(mode="json"), "data": {"blend": blend}})

    make_results(blended())
    assert states(plan.plan(blended(weight=3)))["preprocess"][0] == "cached", "what training alone reads"
    why = states(plan.plan(blended(text_column="code")))["download-data"][1]
    assert why == "differs from the nearest earlier result: data.blend[1].text_column text → code"


@pytest.mark.parametrize(("role", "epochs"), [("all", "16.5"), ("train", "16")])
def test_an_epoch_is_of_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, epochs: str) -> None:
    """Of 4,096 tokens the train share of the split, or all of them where held-out data are of their own."""
    kind, facts = MAKES["preprocess"]
    roles = [role] if role == "all" else [role, "valid", "test"]
    monkeypatch.setitem(MAKES, "preprocess", (kind, facts | {"sets": tuple(facts["sets"][0] | {"role": r} for r in roles)}))
    make_results(config(tmp_path))
    assert f"512 steps × 8 × 16 = 65.5 K tokens = {epochs} epochs" in plan.report(config(tmp_path, steps=512))


def test_data_that_training_could_not_begin_with(tmp_path: Path) -> None:
    """Known as soon as they are tokenized: nothing else is done first."""
    make_results(config(tmp_path))
    too_long, too_short = config(tmp_path, sequence_length=512), config(tmp_path, steps=None, epochs=1e-6)
    told = (
        'train.split="969,30,1" gives the valid split 2 of 64 documents with 128 tokens, and one sample needs 513. '
        'Set train.split to "80,20,0", or lower train.sequence_length (now 512)'
    )
    with pytest.raises(BadConfig) as caught:
        check_ready(too_long, "mine.yaml")
    assert caught.value.problems == [f"mine.yaml: {told}"]
    assert f"length     cannot be: {told}" in plan.report(too_long)
    with pytest.raises(
        BadConfig, match=r"^mine\.yaml: train: epochs=1e-06 of 3,968 tokens each is less than one step of 8 × 16"
    ):
        check_ready(too_short, "mine.yaml")


@pytest.mark.parametrize(
    ("module", "absent"),
    [("flows.cli", ["torch", "prefect"]), ("flows.asked.plan", ["torch", "prefect"]),
     ("flows.show.status", ["torch", "prefect"]),
     ("flows.finetune", ["torch", "transformers", "megatron_core_impl.models.transformer"])],
)  # fmt: skip
def test_what_is_not_imported(module: str, absent: list[str]) -> None:
    code = f"import {module}, sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
