"""Checkpoints of Meta as `model.source`: taken in bit for bit, or refused before anything starts."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import (
    HF,
    MHA,
    SAID,
    check_equal,
    taken_in,
    write_megatron,
    write_meta,
    write_small_tokenizer,
)
from safetensors.torch import save_file
from weights_inputs import random_model

from megatron_core_impl.models import families
from stages.contracts import config as c
from stages.contracts import preflight
from stages.outcomes import BadInput

LLAMA3 = HF | {"rope_theta": 500000.0}


def meta_checkpoint(tmp_path: Path, shards: int = 1) -> Path:
    """A checkpoint of Meta, and a tokenizer."""
    folder = tmp_path / "meta"
    write_meta(folder, HF, random_model(HF), shards)
    write_small_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("hf", "shards", "cuts"), [(HF, 1, "columns"), (HF, 2, "columns"), (MHA, 4, "columns"), (LLAMA3, 2, "rows")]
)
def test_a_checkpoint_of_meta_equals_its_source(tmp_path: Path, hf: dict[str, Any], shards: int, cuts: str) -> None:
    tensors = random_model(hf)
    write_meta(tmp_path / "meta", hf, tensors, shards, cuts=cuts)
    write_small_tokenizer(tmp_path / "meta")
    (tmp_path / "meta" / "LICENSE.txt").write_text("Be kind.")
    found, written, artifact = taken_in(tmp_path / "ws", tmp_path / "meta", config=SAID)
    check_equal(written, tensors)
    assert families.config_from_hf(found) == families.config_from_hf(hf)
    assert found["torch_dtype"] == "bfloat16"
    assert "files/LICENSE.txt" in artifact.files
    assert not any(name.endswith(".pth") for name in artifact.files)


def test_what_params_json_does_not_tell(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF))
    with pytest.raises(BadInput, match=r"meta has no tokenizer: put the model's tokenizer.model, or tokenizer.json and its "
                       r"other files, into .*meta, beside params.json$"):  # fmt: skip
        taken_in(tmp_path / "ws", source, config=SAID)
    write_small_tokenizer(source)
    with pytest.raises(
        BadInput, match=r"does not say for how many positions.*set model.config.max_position_embeddings \(Llama 1"
    ):
        taken_in(tmp_path / "ws", source)
    with pytest.raises(BadInput, match=r"model.config.max_position_embedings: the .* Did you mean max_position_embeddings\?$"):
        taken_in(tmp_path / "ws", source, config={"max_position_embedings": 64})
    with pytest.raises(BadInput, match=r"model.config.max_positions: the config.json of this checkpoint has no such field. Did "
                       r"you mean max_position_embeddings?"):  # fmt: skip
        taken_in(tmp_path / "ws", source, config=SAID | {"max_positions": 3})
    with pytest.raises(BadInput, match=r"model.config.vocab_size: 257 exceeds the 256 rows that are stored"):
        taken_in(tmp_path / "ws", source, config=SAID | {"vocab_size": 257})
    with pytest.raises(BadInput, match=r"config.json: rms_norm_eps='small' must be a finite number"):
        taken_in(tmp_path / "ws", source, config=SAID | {"rms_norm_eps": "small"})
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's, for tiktoken
    with pytest.raises(BadInput, match=r"its tokenizer cannot be read: .*tokenizer.model: is no SentencePiece model"):
        taken_in(tmp_path / "ws", source, config=SAID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 8}, "params.json: n_experts is not supported. Supported: dim, max_seq_len, n_heads"),
        ({"dim": "wide"}, "params.json: dim='wide' must be a count"),
        ({"n_layers": 5}, "params.json: n_layers=5, and the files hold 4"),
        ({"n_layers": 3}, "params.json: n_layers=3, and the files hold 4"),
        ({"n_layers": 10**9}, "params.json: n_layers=1000000000, and the files hold 4"),
        ({"dim": 10**12}, "params.json: dim=1000000000000, and the files hold 32"),
        (
            {"vocab_size": 10**15},
            "params.json: vocab_size=1000000000000000, and the files hold 256 rows. If those are right, set",
        ),
        (
            {"n_heads": 8, "n_kv_heads": 2},
            r"layers.0.attention.wk.weight has shape \[16, 32\], the model needs \[8, 32\] there",
        ),
        ({"use_scaled_rope": True}, "params.json: use_scaled_rope does not say how: model.config.rope_scaling must, as the"),
    ],
)
def test_params_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = meta_checkpoint(tmp_path)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps(params | change))
    with pytest.raises(BadInput, match=message):
        taken_in(tmp_path / "ws", source, config=SAID)


def test_a_missing_file_of_meta(tmp_path: Path) -> None:
    source = meta_checkpoint(tmp_path, 2)
    (source / "consolidated.00.pth").unlink()
    with pytest.raises(BadInput, match=r"meta: holds consolidated.NN.pth for NN = 01: others are missing"):
        taken_in(tmp_path / "ws", source, config=SAID)
    (source / "consolidated.01.pth").rename(source / "consolidated.00.pth")
    with pytest.raises(
        BadInput, match=r"consolidated.00.pth holds 16 of the 32 rows of layers.0.attention.wq.weight \(params.json: dim=32\), "
        r"so the model is stored in 2 files, and there is 1: files are missing$"
    ):  # fmt: skip
        taken_in(tmp_path / "ws", source, config=SAID)
    write_meta(source, HF, random_model(HF), 1)
    shutil.copy(source / "consolidated.00.pth", source / "consolidated.01.pth")
    with pytest.raises(
        BadInput, match=r"the model is stored in 1 file, and there are 2: files of another model are among them$"
    ):
        taken_in(tmp_path / "ws", source, config=SAID)


def test_a_damaged_file_of_meta(tmp_path: Path) -> None:
    """The checksum in the archive tells."""
    source = meta_checkpoint(tmp_path, 2)
    path = source / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        BadInput, match=r"consolidated.01.pth: layers\.\S+: consolidated.01/data/\d+ is damaged: its CRC-32 is "
    ):
        taken_in(tmp_path / "ws", source, config=SAID)


def test_what_checklist_chk_says(tmp_path: Path) -> None:
    """Meta's list of MD5 digests: of the files that are read, where it lies beside them."""
    source = meta_checkpoint(tmp_path, 2)
    names = ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    digests = {name: hashlib.md5((source / name).read_bytes()).hexdigest() for name in names}
    checklist = source / "checklist.chk"
    checklist.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    check_equal(taken_in(tmp_path / "ws", source, config=SAID)[1], random_model(HF))
    for name in names:
        others = {other: digest for other, digest in digests.items() if other != name}
        checklist.write_text("".join(f"{digest}  {n}\n" for n, digest in (others | {name: "0" * 32}).items()))
        with pytest.raises(
            BadInput, match=rf"{name}: is not the file that checklist.chk lists: its MD5 is {digests[name]}, not 0{{32}}. If "
            "it was changed on purpose, remove its line there$"
        ):  # fmt: skip
            taken_in(tmp_path / name, source, config=SAID)
    checklist.write_text(f"{'0' * 32}  consolidated.02.pth\n")
    with pytest.raises(BadInput, match=r"meta/consolidated.02.pth: missing, and checklist.chk lists it$"):
        taken_in(tmp_path / "missing", source, config=SAID)
    checklist.write_text("<html>\n")
    with pytest.raises(BadInput, match=r"checklist.chk: line 1 is no MD5 digest and name of a file$"):
        taken_in(tmp_path / "odd", source, config=SAID)


def test_copies_that_differ(tmp_path: Path) -> None:
    source = meta_checkpoint(tmp_path, 2)
    content = torch.load(source / "consolidated.01.pth")
    content["norm.weight"] += 1
    torch.save(content, source / "consolidated.01.pth")
    with pytest.raises(
        BadInput, match=r"consolidated.01.pth: norm.weight differs from that of consolidated.00.pth: both hold copies of the "
        r"same numbers. One of the files is damaged, or of another checkpoint$"
    ):  # fmt: skip
        taken_in(tmp_path / "ws", source, config=SAID)


def test_a_tensor_that_is_not_stored_row_by_row(tmp_path: Path) -> None:
    source = meta_checkpoint(tmp_path)
    content = torch.load(source / "consolidated.00.pth")
    for name in ("layers.0.attention.wo.weight", "layers.1.attention.wq.weight"):
        content[name] = content[name].t().contiguous().t()
    torch.save(content, source / "consolidated.00.pth")
    check_equal(taken_in(tmp_path / "ws", source, config=SAID)[1], random_model(HF))


def test_what_is_wrong_is_told_before_anything_starts(tmp_path: Path) -> None:
    def problems(**settings: Any) -> list[str]:
        return preflight.check(
            c.PipelineConfig.model_validate(
                {"model": {"source": str(tmp_path / "it"), **settings}, "data": {"source": "ada/text"},
                 "train": {"steps": 1, "sequence_length": 64}, "verify": {"sequence_length": 32}, "layout": {"pp": 8}}
            )
        )  # fmt: skip

    write_meta(tmp_path / "it", HF, random_model(HF))
    (problem,) = problems()
    assert "set model.config.max_position_embeddings" in problem
    layout, length = problems(config={"max_position_embeddings": 63})
    assert layout.startswith("layout: pp=8 exceeds num_hidden_layers=4")
    assert length.startswith("train.sequence_length: 64 exceeds max_position_embeddings=63 of ")
    shutil.rmtree(tmp_path / "it")
    write_megatron(tmp_path / "it", HF, random_model(HF), pp=2)
    assert problems() == [layout]


def test_impossible_sizes_are_told_before_anything_starts(tmp_path: Path) -> None:
    """Before memory is reckoned, too, which goes layer by layer."""
    save_file(random_model(HF), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF | {"num_hidden_layers": 9999}))
    settings = c.PipelineConfig.model_validate(
        {"model": {"source": str(tmp_path)}, "data": {"source": "ada/text"}, "train": {"steps": 1, "sequence_length": 32},
         "verify": {"sequence_length": 32}}
    )  # fmt: skip
    assert preflight.memory_of(settings, None) is None
    (problem,) = preflight.check(settings)
    assert problem.endswith(": config.json: num_hidden_layers=9999, and the weights hold 4 layers")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "other.safetensors").write_bytes(b"\xff" * 40)  # told by download
    assert preflight.check(settings) == []


def test_config_is_for_checkpoints_without_one(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HF))
    with pytest.raises(
        BadInput, match=r"^model.config is for checkpoints of Meta and Megatron-LLM, and this model has a config"
    ):
        taken_in(tmp_path / "ws", tmp_path / "hf", config=SAID)


def test_a_config_json_that_strayed_in(tmp_path: Path) -> None:
    write_megatron(tmp_path / "megatron-llm", HF, random_model(HF))
    write_meta(tmp_path / "meta", HF, random_model(HF))
    for name, owner in (("megatron-llm", "Megatron-LLM"), ("meta", "Meta")):
        (tmp_path / name / "config.json").write_text("{}")
        with pytest.raises(
            BadInput, match=rf"{name} holds a checkpoint of {owner}, and a config.json, but no weights of Hugging Face. To "
            r"import the checkpoint, remove config.json from there; what the checkpoint does not tell, model.config does$"
        ):  # fmt: skip
            taken_in(tmp_path / "ws", tmp_path / name)
