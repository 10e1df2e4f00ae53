"""The configuration: what is refused, and how clearly."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_core_impl.train_config import TrainConfig
from stages.contracts.config import PipelineConfig
from stages.contracts.data_settings import DataSettings
from stages.contracts.sources import expand, list_files, stamp
from stages.contracts.tokenized import stamp_tokenized
from stages.contracts.train_settings import TrainSettings


def config(**changes: Any) -> PipelineConfig:
    base: dict[str, Any] = {"model": {"source": "a/b"}, "data": {"source": "c/d"}, "train": {"steps": 10}}
    return PipelineConfig.model_validate(base | changes)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"trian": {}}, ("trian",), "Extra inputs"),
        ({"train": {"steps": 10, "optimiser": "x"}}, ("train", "optimiser"), "Extra inputs"),
        ({"train": {"steps": 0}}, ("train", "steps"), "greater than or equal to 1"),
        ({"train": {"steps": 10, "warmup_steps": 10}}, ("train",), "warmup_steps=10 must be less than the 10 steps"),
        ({"train": {"steps": 10, "min_lr": 1.0}}, ("train",), "min_lr=1.0 must not exceed lr="),
        ({"train": {"steps": 10, "split": "1,2,3,4"}}, ("train", "split"), "up to three shares"),
        ({"train": {"steps": 10, "split": "nan,1,1"}}, ("train", "split"), "up to three shares"),
        ({"train": {"steps": 10, "split": "inf,1,1"}}, ("train", "split"), "up to three shares"),
        ({"train": {"steps": 10, "split": "100"}}, ("train", "split"), "the first two above 0"),
        (
            {"train": {"steps": 10, "packing": False}},
            (),
            "train.packing=False is for conversations, and data.format=text is not",
        ),
        (
            {"export": {"answers": 3}},
            (),
            "export.answers=3 is for conversations, and data.format=text is not: leave it out",
        ),
        (
            {"data": {"source": "c/d", "format": "alpaca"}, "train": {"steps": 10, "eod_mask_loss": True}},
            (),
            "train.eod_mask_loss=True is for text, and data.format=alpaca is not: leave it out",
        ),
        (
            {"data": {"source": "c/d", "format": "alpaca"}, "preprocess": {"bos_eos": "both"}},
            (),
            "bos_eos=both is for text",
        ),
        ({"train": {"steps": 10, "split": "100,0,0"}}, ("train", "split"), "the first two above 0"),
        ({"train": {"steps": 10**24}}, ("train", "steps"), "less than or equal to 1000000000"),
        ({"train": {"steps": 10, "lr": float("inf")}}, ("train", "lr"), "finite number"),
        ({"train": {"steps": 10, "global_batch_size": 7}, "layout": {"dp": 2}}, (), "not a multiple of"),
        ({"train": {"steps": 10, "sequence_length": 9}, "layout": {"tp": 2}}, (), "layout.tp=2 does not divide"),
        ({"layout": {"pp": 0}}, ("layout", "pp"), "greater than or equal to 1"),
        ({"layout": {"vpp": 2}}, ("layout",), "vpp=2 needs pp of at least 2"),
        ({"train": {"steps": 10, "weight_decay_style": "linear"}}, ("train",), "weight_decay_start=None does not go with"),
        ({"train": {"steps": 10, "loss_scale": 8}}, ("train",), "loss_scale=8.0 is for precision fp16; bf16 needs none"),
        ({"train": {"steps": 10, "ramp_start": 8}}, ("train",), "missing: ramp_increment, ramp_samples"),
        ({"train": {"steps": 10, "lima_dropout": True}}, ("train",), "lima_dropout=True needs hidden_dropout above 0"),
        ({"train": {"steps": 10, "skip_steps": [0]}}, ("train",), "skip_steps has 0, but steps are counted from 1 to 10"),
        ({"train": {"steps": 10, "precision": "fp64"}}, ("train", "precision"), "Input should be 'bf16', 'fp16' or 'fp32'"),
        ({"model": {"source": "a/b", "dtype": "bf16"}}, ("model", "dtype"), "'float32', 'bfloat16' or 'float16'"),
        ({"model": {"source": "a/b", "new_rows": "zeros"}}, ("model",), "new_rows=zeros is for added tokens, and added_tokens"),
        (
            {"export": {"shard_size": "5 gigs"}},
            ("export", "shard_size"),
            "'5 gigs' must be a number of bytes, or a size such as",
        ),
        ({"export": {"shard_size": True}}, ("export", "shard_size"), "True must be a number of bytes"),
        ({"export": {"shard_size": 0}}, ("export", "shard_size"), "greater than or equal to 1"),
        (
            {"export": {"override_special_tokens": {"end": "x"}}},
            ("export", "override_special_tokens", "end", "[key]"),
            "'bos', 'eos', 'pad', 'unk', 'sep', 'cls' or 'mask'",
        ),
        ({"push": {"to": "hub"}}, ("push",), "to=hub needs repo"),
        ({"push": {"to": "folder"}}, ("push",), "to=folder needs folder"),
        ({"push": {"to": "hub", "repo": "no-owner"}}, ("push", "repo"), "match pattern"),
    ],
)
def test_refused(changes: dict[str, Any], where: tuple[str, ...], what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    errors = caught.value.errors()
    assert [e["loc"] for e in errors] == [where]
    assert what in errors[0]["msg"]


@pytest.mark.parametrize(
    ("train", "layout", "what"),
    [
        (
            {"global_batch_size": 10},
            {"dp": 4},
            "train.global_batch_size=10 is not a multiple of train.micro_batch_size × layout.dp = 1 × 4 = 4. "
            "Nearest legal: 8 or 12",
        ),
        (
            {"global_batch_size": 2, "micro_batch_size": 3},
            {},
            "train.micro_batch_size × layout.dp = 3 × 1 = 3. Nearest legal: 3",
        ),
        (
            {"global_batch_size": 16, "ramp_start": 4, "ramp_increment": 3, "ramp_samples": 100},
            {"dp": 2},
            "train.ramp_start, ramp_increment: a batch of 7 is not a multiple of train.micro_batch_size × layout.dp = "
            "1 × 2 = 2. Nearest legal: 6 or 8",
        ),
        (
            {"global_batch_size": 12},
            {"pp": 4, "vpp": 2, "dp": 2},
            "layout.vpp=2 needs a number of micro batches that is a multiple of layout.pp=4, and a batch of 12 samples has 6 "
            "(train.micro_batch_size × layout.dp = 2 samples each). Nearest legal batch: 8 or 16. With layout.vpp=1 any number",
        ),
        (
            {"sequence_length": 9, "micro_batch_size": 1},
            {"tp": 2},
            "layout.tp=2 does not divide the 1 × 9 tokens of a micro batch (train.micro_batch_size × train.sequence_length), "
            "which it shares out. Make one of the two a multiple of 2",
        ),
    ],
)
def test_batches_that_the_layout_cannot_share_out(train: dict[str, Any], layout: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(train={"steps": 10, **train}, layout=layout)
    [error] = caught.value.errors()
    assert what in error["msg"]


def test_settings_are_those_of_the_core() -> None:
    """Every setting reaches the trainer under its own name; what the core adds is its default."""
    ours, core = TrainSettings(steps=10), TrainConfig(steps=10, **NEEDED)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert set(TrainSettings.model_fields) - {"epochs", "tokens"} == set(names)
    differ = {name for name in names if getattr(ours, name) != getattr(core, name)}
    assert differ == {"precision"}, "bf16 for GPUs, fp32 for whoever uses the core as a library"
    assert ours.train_config().precision == "bf16"


NEEDED: dict[str, Any] = {"sequence_length": 1024, "micro_batch_size": 1, "global_batch_size": 8, "lr": 3e-4}


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("5GB", 5_000_000_000), ("1.5 kb", 1500), ("2GiB", 2**31), ("500MB", 500_000_000)],
)
def test_sizes_of_files(size: int | str, count: int) -> None:
    assert config(export={"shard_size": size}).export.shard_size == count


def test_every_field_is_described() -> None:
    """The descriptions are the form in the browser and the help of the command line."""
    missing = []

    def walk(model: Any, path: str) -> None:
        for name, field in model.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            if inner is not None:
                walk(field.annotation, f"{path}{name}.")
            elif not field.description:
                missing.append(path + name)

    walk(PipelineConfig, "")
    assert missing == []


def test_list_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "x/c.py", "x/y/d.py", "site-packages/e.py", "x/site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*include: str, exclude: tuple[str, ...] = ()) -> list[str]:
        return [f.relative_to(tmp_path).as_posix() for f in list_files(tmp_path, include, exclude)]

    assert names("**/*.py") == ["a.py", "site-packages/e.py", "x/c.py", "x/site-packages/f.py", "x/y/d.py"]
    assert names("**/*.py", exclude=("site-packages/**",)) == ["a.py", "x/c.py", "x/site-packages/f.py", "x/y/d.py"]
    assert names("**/*.py", exclude=("**/site-packages/**",)) == ["a.py", "x/c.py", "x/y/d.py"]
    assert names("*.txt", "x/*.py", exclude=("**/site-packages/**",)) == ["b.txt", "x/c.py", "x/y/d.py"]


def test_patterns_of_paths(tmp_path: Path) -> None:
    for name in ("run[1]/a.jsonl", "run[1]/x/b.jsonl", "run1/c.jsonl", ".h.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def found(pattern: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in expand(f"{tmp_path}/{pattern}")[1]]

    assert found("run[1]/*.jsonl") == ["run[1]/a.jsonl"], "a folder that is there is meant"
    assert found("run[1]/**") == ["run[1]/a.jsonl", "run[1]/x/b.jsonl"], "files, whatever this version of Python takes ** for"
    assert found("run[12]/*") == ["run1/c.jsonl"]


def test_text_columns() -> None:
    assert DataSettings(source="a").text_columns == ("text",)
    assert DataSettings(source="a", text_column=["title", "body"]).text_columns == ("title", "body")
    written = DataSettings.model_validate_json('{"source": "a", "text_column": ["title", "body"]}', strict=True)
    assert written.text_columns == ("title", "body")
    for wrong in ([], ["a", "a"], ["a", ""], ["a", 3], "", 5):
        with pytest.raises(ValidationError, match="must be a name, or a list of names that differ") as caught:
            DataSettings(source="a", text_column=wrong)
        assert [error["loc"] for error in caught.value.errors()] == [("text_column",)]


def test_stamp_notices_change(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "note.txt").write_text("1")
    before = stamp(str(tmp_path), ("**/*.py",))
    (tmp_path / "note.txt").write_text("22")
    assert stamp(str(tmp_path), ("**/*.py",)) == before
    (tmp_path / "a.py").write_text("22")
    assert stamp(str(tmp_path), ("**/*.py",)) != before
    assert stamp("some/hub-id") is None


def test_stamp_of_tokenized_data_notices_change(tmp_path: Path) -> None:
    for name in ("code.bin", "code.idx", "codec.bin"):
        (tmp_path / name).write_text("1")
    before = stamp_tokenized(str(tmp_path / "code"))
    assert stamp_tokenized(str(tmp_path / "code.bin")) == before
    (tmp_path / "codec.bin").write_text("22")
    assert stamp_tokenized(str(tmp_path / "code")) == before
    (tmp_path / "code.idx").write_text("22")
    assert stamp_tokenized(str(tmp_path / "code")) not in (None, before)
    (tmp_path / "code.idx").unlink()
    assert stamp_tokenized(str(tmp_path / "code")) is None
