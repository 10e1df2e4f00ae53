"""What a person meant who writes a configuration in another program's words, or leaves a value empty: told in a short line."""

from pathlib import Path

import pytest
from test_load_config import GOOD, problems

from flows.asked import config_errors
from stages.contracts.config import PipelineConfig

ROOT = Path(__file__).parents[2]


def problem(tmp_path: Path, *overrides: str, text: str = GOOD) -> str:
    [told] = problems(tmp_path, text, *overrides)
    return told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rate=1e-4", "unknown key. Did you mean train.lr?"),
        ("learning_rate=1e-4", "unknown key. Did you mean train.lr?"),
        ("train.batch_size=8", "unknown key. Did you mean train.global_batch_size?"),
        ("model.name=a/b", "unknown key. Did you mean model.source?"),
        ("train.lr=", "it is empty, and must be a number: write a value, or leave it out"),
        ("push.to=", "it is empty. Legal here: dry-run, folder, hub"),
        ("layout=", "it is empty. It must have keys of: tp, pp, dp, vpp"),
        ("data.include=", "it is empty, and must be a list: write a value, or leave it out"),
        ("train.steps=1e9", "1000000000.0 must be a whole number, written without point or exponent: 1000000000"),
        ("train.seed=1.5", "1.5 must be a whole number"),
        ("train.seed=1e300", "1e+300 must be a whole number"),
    ],
)
def test_what_was_meant(tmp_path: Path, override: str, told: str) -> None:
    assert problem(tmp_path, override) == f"--set {override}: {told}"


def test_of_many_keys_the_nearest_are_shown(tmp_path: Path) -> None:
    told = problem(tmp_path, "train.evaluate_every=7")
    assert told.startswith("--set train.evaluate_every=7: unknown key. Legal here: eval_batches, ")
    assert told.endswith(" more; see configs/llama2-7b.yaml")
    assert (ROOT / "configs" / "llama2-7b.yaml").exists()
    assert len(told) < 250
    told = problem(tmp_path, text=GOOD.replace("{steps: 10}", "7"))
    assert "It must have keys of: steps, epochs, tokens, sequence_length, micro_batch_size, global_batch_size, and " in told


def test_what_is_suggested_is_there() -> None:
    for meant in config_errors.ELSEWHERE.values():
        section, name = config_errors._find(tuple(meant.split(".")))
        assert section is not None
        assert name in section.model_fields, meant
    assert not {*PipelineConfig.model_fields} & {*config_errors.ELSEWHERE}, "these are keys of ours"
