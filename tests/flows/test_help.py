"""The help of the `finetune` command, and the examples that are shown."""

import itertools
import re
import shlex

import pytest
from runners import ROOT

from flows import cli
from flows.asked.load_config import load_config


@pytest.mark.parametrize(
    ("arguments", "told"),
    [([], "130 Ctrl-C"), (["run"], "HF_TOKEN"), (["rerun"], "goes on where it stopped"), (["plan"], "starts nothing"),
     (["status"], "newest first"), (["rerun"], "--fresh"), (["run"], "--from RESULT"), (["serve"], "stops them"),
     (["ui"], "nothing is asked of any other machine"), (["doctor"], "the command that mends what is missing")],
)  # fmt: skip
def test_help_is_worth_reading(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--help"])
    assert told in " ".join(capsys.readouterr().out.split())


def shown_commands() -> list[str]:
    """The `finetune` commands with `--set` that the help and the README show."""
    texts = [cli.parser().format_help(), (ROOT / "README.md").read_text()]
    return [found.strip() for text in texts for found in re.findall(r"finetune (?:run|plan)[^|`#\n]*--set[^|`#\n]*", text)]


@pytest.mark.parametrize("command", shown_commands())
def test_the_examples_of_help_and_readme_are_good(command: str) -> None:
    words = shlex.split(re.split(r"\s{3,}", command)[0].replace("[", "").replace("]", ""))
    file = "configs/demo.yaml" if words[2] == "CONFIG.yaml" else words[2]
    overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
    assert overrides
    load_config(ROOT / file, overrides)


def test_there_are_examples() -> None:
    assert len(shown_commands()) >= 3
