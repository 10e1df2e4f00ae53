"""What a person is told about a wrong configuration: every problem, one line each, with where, what and what is legal."""

import json
from pathlib import Path

import pytest

from flows.asked.load_config import BadConfig, check_ready, load_config
from stages.contracts import preflight

GOOD = """
model: {source: somebody/model}
data: {source: somebody/data}
train: {steps: 10}
"""


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """What is said about a file, with the file's name as `mine.yaml`."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load_config(file, overrides)
    return [line.replace(str(file), "mine.yaml") for line in caught.value.problems]


def test_numbers_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("steps: 10", "steps: 10, lr: 1e-4, min_lr: 0"))
    config = load_config(file, ["train.min_lr=1e-5", "preprocess.bos_eos=none", 'export.prompts=["def f("]'])
    assert (config.train.lr, config.train.min_lr, config.preprocess.bos_eos) == (1e-4, 1e-5, "none")
    assert config.export.prompts == ("def f(",)


def test_bounds_are_told_as_people_write_them(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD, "train.lr=-1", "preprocess.max_malformed=1.5", "verify.sequence_length=99999999") == [
        "--set preprocess.max_malformed=1.5: 1.5 must be at most 1",
        "--set verify.sequence_length=99999999: 99999999 must be at most 16,777,216",
        "--set train.lr=-1: -1 must be greater than 0",
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train: {steps: 10, optimiser: adamw}", "train.optimiser: unknown key. Did you mean train.optimizer?"),
        ("train: {steps: 10}\nlr: 1", "lr: unknown key. Did you mean train.lr?"),
        ("train: {steps: 10}\nzzz: 1",
         "zzz: unknown key. Legal here: workspace, model, data, preprocess, verify, layout, train, export, push"),
        ("train: {steps: ten}", 'train.steps: "ten" must be a whole number'),
        ("train: {steps: true}", "train.steps: true must be a whole number"),
        ("train: {steps: 0}", "train.steps: 0 must be at least 1"),
        ("train: {steps: 10, lr: -1}", "train.lr: -1 must be greater than 0"),
        ("train: {steps: 10, lr: .inf}", "train.lr: inf is not a number that can be used"),
        ("train: {steps: 10, schedule: cosin}",
         'train.schedule: "cosin" is not legal. Legal here: cosine, linear, constant'),
        ("train: {}", "train: the length is given by exactly one of steps, epochs and tokens, and none of them is given"),
        ("train: 7", "train: 7 is no section. It must have keys of: steps, epochs, tokens, sequence_length"),
        ("train: {steps: 10, warmup_steps: 10}",
         "train: warmup_steps=10 must be less than the 10 steps of the schedule"),
        ("train: {steps: 10}\npush: {to: hub}", "push: to=hub needs repo, e.g. repo: my-name/my-model"),
        ("train: {steps: 10}\npush: {repo: me}", 'push.repo: "me" is not legal. repo is: hub: owner/name of the model repo'),
        ("train: {steps: 10}\nlayout: {dp: 3}",
         "train.global_batch_size=8 is not a multiple of train.micro_batch_size × layout.dp = 1 × 3 = 3"),
    ],
)  # fmt: skip
def test_one_clear_line(tmp_path: Path, line: str, told: str) -> None:
    text = GOOD.replace("train: {steps: 10}", line)
    [problem] = problems(tmp_path, text)
    assert problem.startswith(f"mine.yaml: {told}")
    assert "\n" not in problem


BLEND = GOOD.replace("source: somebody/data", "blend: [{source: a/b}, {source: c/d}]")


@pytest.mark.parametrize(
    ("text", "overrides", "told"),
    [
        ("{source: c/d, wieght: 2}", [], "mine.yaml: data.blend[1].wieght: unknown key. Did you mean data.blend[1].weight?"),
        ("{source: c/d, weight: -1}", [], "mine.yaml: data.blend[1].weight: -1 must be greater than 0"),
        ("{source: c/d, weight: .nan}", [], "mine.yaml: data.blend[1].weight: nan is not a number that can be used"),
        ("{source: c/d, format: alpca}", [], 'mine.yaml: data.blend[1].format: "alpca" is not legal. Legal here: text, mess'),
        ("{source: c/d, include: [1]}", [], "mine.yaml: data.blend[1].include[0]: 1 must be text"),
        ("{weight: 2}", [], "mine.yaml: data.blend[1].source: missing. source is: "),
        ("7", [], "mine.yaml: data.blend[1]: 7 is no section. It must have keys of: "),
        ("{source: c/d}", ["data.blend[0].weight=x"], '--set data.blend[0].weight=x: "x" must be a number'),
        ("{source: c/d}", ["data.blend[0]={wieght: 2}"], "--set data.blend[0]={wieght: 2}: data.blend[0].source: missing. "),
        ("{source: c/d}", ["data.blend[2].weight=1"],
         "--set data.blend[2].weight=1: data.blend has 2 items, the first is [0]"),
        ("{source: c/d}", ["data.valid[0].source=x"], "--set data.valid[0].source=x: data.valid is no list"),
        ("{source: c/d}", ["data.blend.weight=1"], "--set data.blend.weight=1: data.blend is no section"),
        ("{source: c/d}", ["data.blend[x]=1"], "--set data.blend[x]=1: must be key.path=value, e.g. --set train.lr=1e-4 or "),
    ],
)  # fmt: skip
def test_a_place_in_a_list_is_named(tmp_path: Path, text: str, overrides: list[str], told: str) -> None:
    assert problems(tmp_path, BLEND.replace("{source: c/d}", text), *overrides)[0].startswith(told)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BLEND)
    blend = load_config(tmp_path / "mine.yaml", ["data.blend[1].weight=0.25", "data.blend[0].columns={}"]).data.blend
    assert [(source.source, source.weight) for source in blend] == [("a/b", 1.0), ("c/d", 0.25)]


def test_all_problems_at_once_and_overrides_name_themselves(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "steps: 10, lr: fast")
    found = problems(tmp_path, text, "train.seed=-1", "train.optimiser=sgd")
    assert sorted(found) == [
        "--set train.optimiser=sgd: unknown key. Did you mean train.optimizer?",
        "--set train.seed=-1: -1 must be at least 0",
        'mine.yaml: train.lr: "fast" must be a number',
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2\n", "mine.yaml, line 2: a: stands here twice; keep one"),
        ("a: [1\n", "mine.yaml, line 2, column 1: not YAML: "),
        ("- 1\n", "mine.yaml: must be a mapping with the keys workspace, model, "),
        ("", "mine.yaml: must be a mapping with the keys workspace, model, "),
        ("2020-01-01: 3\n", "mine.yaml: 2020-01-01: a key must be text, and this is a date: put it in quotes"),
        ("train: {? [1, 2] : 3}\n", "mine.yaml: train.(1, 2): a key must be text, and this is a tuple: put it in quotes"),
        ("a: &a [*a]\n", "mine.yaml: a list or section holds itself, or is nested too deeply: write it out"),
        ("[" * 3000, "mine.yaml: a list or section holds itself, or is nested too deeply: write it out"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, told: str) -> None:
    [problem] = problems(tmp_path, text)
    assert problem.startswith(told)


def test_what_a_local_model_refuses_of_the_layout_is_told_first(tmp_path: Path) -> None:
    fields = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    text = GOOD.replace("somebody/model", str(tmp_path)).replace("steps: 10", "steps: 10, sequence_length: 64")
    tokens = (
        "layout.tp={} does not divide the 1 × 64 tokens of a micro batch (train.micro_batch_size × train.sequence_length), "
        "which it shares out. Make one of the two a multiple of {}"
    )
    assert problems(tmp_path, text, "layout.tp=3") == [
        "mine.yaml: layout: tp=3 cannot share out num_attention_heads=4 with num_key_value_heads=4 and "
        "intermediate_size=128. Legal here: 1, 2, 4",
        f"mine.yaml: {tokens.format(3, 3)}",
    ]
    assert problems(tmp_path, text, "layout.tp=2", "train.sequence_length=63") == [
        f"mine.yaml: {tokens.format(2, 2).replace('64', '63')}"
    ], "the model has nothing against 2"
    assert problems(tmp_path, text.replace(str(tmp_path), "some/hub-id"), "layout.tp=3") == [
        f"mine.yaml: {tokens.format(3, 3)}"
    ], "what is on the Hub is known once it is here"
    assert len(problems(tmp_path, text, "layout.tp=three")) == 1, "no layout to ask the model about"


def test_missing_file_and_wrong_override(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"nothing\.yaml: no such file$"):
        load_config(tmp_path / "nothing.yaml")
    assert problems(tmp_path, GOOD, "train.lr") == [
        "--set train.lr: must be key.path=value, e.g. --set train.lr=1e-4 or data.blend[0].weight=2"
    ]
    assert problems(tmp_path, GOOD, "train.lr.x=1") != []
    (tmp_path / "a.yaml").touch()
    with pytest.raises(BadConfig) as caught:
        load_config(tmp_path)
    folder = f"{tmp_path}: is a folder; name a configuration, a YAML file. In this folder: "
    assert caught.value.problems == [f"{folder}{tmp_path / 'a.yaml'}, {tmp_path / 'mine.yaml'}"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trian.lr=1", "--set trian.lr=1: trian: unknown key. Did you mean train?"),
        ("train={steps: 1, lrr: 1}", "--set train={steps: 1, lrr: 1}: train.lrr: unknown key. Did you mean train.lr?"),
        ("push.to=hub", "--set push.to=hub: push: to=hub needs repo"),  # the section was not there before
        ("train.warmup_steps=10", "mine.yaml: train: warmup_steps=10 must be less than the 10 steps"),
    ],
)
def test_a_key_that_an_override_made_is_not_blamed_on_the_file(tmp_path: Path, override: str, told: str) -> None:
    [problem] = problems(tmp_path, GOOD, override)
    assert problem.startswith(told)


def test_a_check_that_breaks_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(config: object) -> list[str]:
        raise KeyError("hidden_size")

    monkeypatch.setattr(preflight, "check", check)
    (tmp_path / "mine.yaml").write_text(GOOD.replace("somebody/data", "~nobody-of-this-name/text.jsonl"))
    with pytest.raises(BadConfig) as caught:
        check_ready(load_config(tmp_path / "mine.yaml"), "mine.yaml")
    assert caught.value.problems == [
        f"mine.yaml: data.source: ~nobody-of-this-name/text.jsonl: no such file or folder (seen from {Path.cwd()})",
        "mine.yaml: model.source or push: cannot be checked (KeyError: 'hidden_size')",
    ]


def test_what_is_known_before_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("somebody/model", "./model").replace("somebody/data", "/no/text.jsonl"))
    with pytest.raises(BadConfig) as caught:
        check_ready(load_config(file, ["push.to=hub", "push.repo=me/mine"]), "mine.yaml")
    assert caught.value.problems == [
        f"mine.yaml: model.source: ./model: no such file or folder (seen from {tmp_path})",
        f"mine.yaml: data.source: /no/text.jsonl: no such file or folder (seen from {tmp_path})",
        "mine.yaml: push.to: hub needs a token: set the environment variable HF_TOKEN to one that may write to me/mine, "
        "or push.to: dry-run",
    ]


def test_tokenized_data_are_known_by_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "old").mkdir(parents=True)
    for name in ("code", "talks-text", "talks-role"):
        for end in (".bin", ".idx"):
            (tmp_path / "corpus" / f"{name}{end}").touch()
    (tmp_path / "corpus" / "old" / "half.bin").touch()
    file = tmp_path / "mine.yaml"

    def told(*sources: str) -> list[str]:
        blend = ", ".join(f"{{source: {source}, format: tokenized}}" for source in sources)
        file.write_text(GOOD.replace("source: somebody/data", f"blend: [{blend}]"))
        try:
            check_ready(load_config(file), "mine.yaml")
        except BadConfig as error:
            return error.problems
        return []

    assert told("corpus/code", f"{tmp_path}/corpus/code.idx", "./corpus/old/../code.bin") == []
    assert told("corpus/talks") == []
    assert told("corpus/cod", "corpus/old/half", "corpus/talks-role") == [
        "mine.yaml: data.blend[0].source: there is no dataset corpus/cod, neither .bin and .idx nor -text and -role. "
        "Name one of: corpus/code, corpus/talks-role, corpus/talks-text",
        "mine.yaml: data.blend[1].source: corpus/old/half lacks half.idx: it needs .bin and .idx",
        "mine.yaml: data.blend[2].source: corpus/talks-role is a stream of conversations, of -text and -role: name their "
        "prefix, corpus/talks",
    ]
    assert told("corpus/code", "corpus/talks") == [
        "mine.yaml: data: data.blend[0] is text and data.blend[1] is conversations; a model is trained on one"
    ]


def test_a_local_model_that_the_layout_does_not_fit(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    fields = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(fields))
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("somebody/model", str(model)))
    check_ready(load_config(file), "mine.yaml")
    with pytest.raises(BadConfig, match=r"mine\.yaml: layout: tp=4 cannot share out num_attention_heads=6 .*: 1, 2, 3, 6"):
        check_ready(load_config(file, ["layout.tp=4"]), "mine.yaml")
