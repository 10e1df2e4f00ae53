"""Checkpoints of Meta and Megatron-LLM as `model.source`: taken in bit for bit, and all the way through the stages."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from download_runs import data_spec, done, model_spec
from foreign_checkpoints import (
    FALCON,
    FALCON40,
    HF,
    LLAMA1,
    MISTRAL,
    check_equal,
    in_llama_s_words,
    taken_in,
    write_megatron,
    write_meta,
    write_small_tokenizer,
)
from safetensors.torch import load_file, save_file
from weights_inputs import random_model
from workspaces import read_canonical, references, sentencepiece_model, start

from megatron_core_impl.models import families
from stages import download, preprocess, runtime
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import preflight, specs
from stages.runtime import BadInput

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")

SAID = {"max_position_embeddings": 64}


# ── The reference's own files ───────────────────────────────────────────────────────────────────────────────────────────────


@needs_golden
@pytest.mark.parametrize(("model", "form"), [("llama2_gqa", "tp1pp1"), ("llama2_gqa", "tp2pp2"), ("falcon7", "tp1pp1")])
def test_golden_checkpoints_equal_their_source(
    tmp_path: Path, model: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / model / form, source)
    write_small_tokenizer(source)
    hf, tensors, artifact = taken_in(tmp_path / "ws", source)
    check_equal(tensors, load_file(GOLDEN / model / "hf" / "model.safetensors"))
    expected = json.loads((GOLDEN / model / "hf" / "config.json").read_text())
    assert families.config_from_hf(hf) == families.config_from_hf(expected)
    assert (hf["bos_token_id"], hf["eos_token_id"]) == (0, 1), "the tokenizer's"
    assert hf["torch_dtype"] == artifact.model.dtype == "float32"
    assert artifact.tokenizer_files == ("tokenizer.json", "tokenizer_config.json")
    assert ("written by Megatron-LLM's checkpoint_util" in capsys.readouterr().out) == (form == "tp2pp2")


def through_the_stages(root: Path, source: Path, **settings: Any) -> a.VerificationArtifact:
    """download, convert and verify as processes; the data, which are as ever, in this one."""
    workspace = root / "ws"
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": line * 8}) + "\n" for line in Path(__file__).read_text().split("\n\n\n"))
    )
    made: dict[str, a.Artifact] = {"model": done(model_spec(workspace, source, **settings))}
    made["data"] = runtime.execute(data_spec(workspace, root / "text.jsonl"), download.run)
    inputs = references({"data": made["data"], "model": made["model"]})
    made["dataset"] = runtime.execute(specs.PreprocessSpec(workspace=str(workspace), inputs=inputs), preprocess.run)
    convert = specs.ConvertSpec(workspace=str(workspace), inputs=references({"model": made["model"]}))
    made["weights"] = finished(convert)
    inputs = references({name: made[name] for name in ("model", "weights", "dataset")})
    small = c.VerifySettings(batches=1, batch_size=2, sequence_length=48)
    result = finished(specs.VerifySpec(workspace=str(workspace), inputs=inputs, settings=small))
    assert isinstance(result, a.VerificationArtifact)
    return result


def finished(spec: specs.Spec) -> a.Artifact:
    process = start(spec)
    assert process.returncode == 0, process.stdout + process.stderr
    return a.load_artifact(spec.folder)


@needs_golden
def test_a_golden_checkpoint_through_the_stages(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama2_gqa" / "tp2pp2", source)
    write_small_tokenizer(source)
    assert through_the_stages(tmp_path, source).argmax_agreement == 1


def test_a_checkpoint_of_meta_through_the_stages(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    hf = HF | {"vocab_size": 400}
    write_meta(source, hf, random_model(hf), shards=2)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    assert through_the_stages(tmp_path, source, config=SAID).argmax_agreement == 1


# ── Meta ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MHA = HF | {"num_key_value_heads": 4, "rope_theta": 1e6}  # Code Llama's
LLAMA3 = HF | {"rope_theta": 500000.0}


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
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF))
    write_small_tokenizer(source)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps(params | change))
    with pytest.raises(BadInput, match=message):
        taken_in(tmp_path / "ws", source, config=SAID)


def test_a_missing_file_of_meta(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF), 2)
    write_small_tokenizer(source)
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
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF), 2)
    write_small_tokenizer(source)
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
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF), 2)
    write_small_tokenizer(source)
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
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF), 2)
    write_small_tokenizer(source)
    content = torch.load(source / "consolidated.01.pth")
    content["norm.weight"] += 1
    torch.save(content, source / "consolidated.01.pth")
    with pytest.raises(
        BadInput, match=r"consolidated.01.pth: norm.weight differs from that of consolidated.00.pth: both hold copies of the "
        r"same numbers. One of the files is damaged, or of another checkpoint$"
    ):  # fmt: skip
        taken_in(tmp_path / "ws", source, config=SAID)


def test_a_tensor_that_is_not_stored_row_by_row(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    write_meta(source, HF, random_model(HF))
    write_small_tokenizer(source)
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
    (tmp_path / "config.json").write_text(json.dumps(HF | {"num_hidden_layers": 10**9}))
    settings = c.PipelineConfig.model_validate(
        {"model": {"source": str(tmp_path)}, "data": {"source": "ada/text"}, "train": {"steps": 1, "sequence_length": 32},
         "verify": {"sequence_length": 32}}
    )  # fmt: skip
    assert preflight.memory_of(settings, None) is None
    (problem,) = preflight.check(settings)
    assert problem.endswith(": config.json: num_hidden_layers=1000000000, and the weights hold 4 layers")
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


# ── Megatron-LLM ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hf", "form"),
    [
        (HF, {}),
        (HF, {"dialect": "converter"}),
        (HF, {"tp": 2, "iteration": 100}),
        (HF, {"pp": 4, "iteration": 1234567}),
        (HF, {"tp": 2, "pp": 2, "model_name": "llama2", "rope_scaling_factor": 4.0}),
        (HF, {"pp": 2, "vpp": 2}),
        (LLAMA1, {"tp": 2, "model_name": "llama"}),
        (MHA, {"tp": 4, "pp": 2, "model_name": "codellama"}),
        (MISTRAL, {"tp": 2, "dialect": "converter", "sliding_window_size": 4096}),
        (MISTRAL, {"pp": 2, "model_name": "mistral"}),  # as resharded: the window is lost, and known
        (FALCON, {"dialect": "converter"}),
        (FALCON, {"pp": 2, "model_name": "falcon"}),  # tied: the last stage has a copy
        (FALCON40, {"tp": 2, "parallel_layernorm": True}),
        (FALCON40, {"tp": 2, "pp": 4, "parallel_layernorm": True}),
    ],
)  # fmt: skip
def test_a_checkpoint_of_megatron_equals_its_source(tmp_path: Path, hf: dict[str, Any], form: dict[str, Any]) -> None:
    tensors = random_model(hf)
    root = tmp_path / "megatron"
    write_megatron(root, in_llama_s_words(hf), tensors, **form)
    write_small_tokenizer(root)
    found, _, artifact = taken_in(tmp_path / "ws", root)
    check_equal(read_canonical(tmp_path / "ws" / artifact.path / "files"), tensors)
    expected = hf | ({"rope_scaling": {"type": "linear", "factor": 4.0}} if "rope_scaling_factor" in form else {})
    assert families.config_from_hf(found) == families.config_from_hf(expected)


def test_one_iteration_of_several(tmp_path: Path) -> None:
    root = tmp_path / "megatron"
    first = {name: tensor + 1 for name, tensor in random_model(HF).items()}
    folder = write_megatron(root, HF, first, iteration=100)
    write_megatron(root, HF, random_model(HF), iteration=200)
    write_small_tokenizer(root)
    check_equal(taken_in(tmp_path / "latest", root)[1], random_model(HF))
    check_equal(taken_in(tmp_path / "named", folder)[1], first)


def test_a_padded_vocabulary(tmp_path: Path) -> None:
    root, hf = tmp_path / "megatron", HF | {"vocab_size": 250}
    tensors = random_model(hf)
    write_megatron(root, hf, tensors, tp=2, rows=256)
    write_small_tokenizer(root)
    found, written, _ = taken_in(tmp_path / "all", root)
    assert found["vocab_size"] == 256, "what is stored is kept"
    assert torch.equal(written["lm_head.weight"][:250], tensors["lm_head.weight"])
    assert torch.equal(written["lm_head.weight"][250:], tensors["lm_head.weight"][-1:].expand(6, -1))
    found, written, _ = taken_in(tmp_path / "cut", root, config={"vocab_size": 250})
    check_equal(written, tensors)
    assert found["vocab_size"] == 250
    found, written, _ = taken_in(tmp_path / "half", root, config={"vocab_size": 100})  # less than the first rank has
    assert torch.equal(written["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"][:100])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model_name": "codellama"}, r"its arguments give rope_theta=10000, and a codellama has 1e\+06. Megatron-LLM does not "
         r"keep this argument when it loads or reshards a checkpoint, so say what is true: model.config.rope_theta: 1e"),
        ({"model_name": "llama"}, "its arguments give rms_norm_eps=1e-05, and a llama has 1e-06"),
        ({"model_name": "gpt"}, "args.model_name='gpt' is not supported where parallel_attn=False; it must be codellama or"),
        ({"use_bias": True}, "args.use_bias=True is not supported where parallel_attn=False: Megatron-LLM's Llama, "
         "Code Llama and Mistral have use_bias=False, and only these can be taken in"),
        ({"glu_activation": "geglu"}, "args.glu_activation='geglu' is not supported"),
        ({"use_rms_norm": False}, "args.use_rms_norm=False is not supported"),
        ({"position_embedding_type": "absolute"}, "args.position_embedding_type='absolute' is not supported"),
        ({"kv_channels": 16}, "args.kv_channels=16 is not hidden_size / num_attention_heads"),
        ({"num_layers": None}, "args.num_layers=None must be a whole number"),
        ({"tensor_model_parallel_size": 2}, "say 2 tensor and 1 pipeline parallel ranks, and it holds the files of mp_rank_00"),
        ({"tensor_model_parallel_size": "2"}, "args.tensor_model_parallel_size='2' is no number of ranks"),
        ({"num_layers": 3}, "release: args.num_layers=3, and its files hold 4"),
        ({"num_layers": 10**9}, "release: args.num_layers=1000000000, and its files hold 4"),
        ({"hidden_size": 10**9}, "release: args.hidden_size=1000000000, and its files hold 32"),
        ({"num_attention_heads": 0}, "args.num_attention_heads=0 must be a whole number of at least 1"),
        ({"rope_theta": 10**400, "model_name": "llama2"}, "its arguments give rope_theta=a number of 1,329 bits, which"),
        ({"model_name": ["llama2"]}, r"args.model_name=\['llama2'\] is not supported where parallel_attn=False"),
        ({"sliding_window_size": 99}, "its arguments give sliding_window=99, and a mistral has 4096. .* say what is true: "
         r"model.config.sliding_window: 4096 \(or 99, if it was trained so\)"),
        ({"sliding_window_size": 99, "model_name": "llama2"}, "args.sliding_window_size=99 is not supported in a llama2: of "
         "its models, only Mistral has a window, of 4096"),
        ({"ffn_hidden_size": 40}, r"dense_h_to_4h.weight has shape \[96, 32\], the model needs \[80, 32\] there"),
        ({"tie_embed_logits": True}, "holds tensors that the model does not have there: lm_head"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    root = tmp_path / "megatron"
    write_megatron(root, HF, random_model(HF), **args) if "tensor_model_parallel_size" not in args else _with_args(root, args)
    write_small_tokenizer(root)
    with pytest.raises(BadInput, match=message):
        taken_in(tmp_path / "ws", root)


NUMBERS_AND_NAMES = (
    "num_layers", "hidden_size", "num_attention_heads", "num_attention_heads_kv", "ffn_hidden_size", "kv_channels",
    "max_position_embeddings", "rope_theta", "rope_scaling_factor", "layernorm_epsilon", "model_name", "glu_activation",
    "position_embedding_type", "tensor_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "tie_embed_logits",
    "sliding_window_size", "use_bias",
)  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS_AND_NAMES)
def test_an_argument_that_has_no_end(tmp_path: Path, name: str) -> None:
    """A list that holds a list four times, and so on: a little in the file, and endless where it is written out."""
    value: Any = "x"
    for _ in range(40):
        value = [value] * 4
    root = tmp_path / "megatron"
    args = {name: value} | ({"pipeline_model_parallel_size": 2} if "pipeline" in name else {})
    _with_args(root, args)
    write_small_tokenizer(root)
    with pytest.raises(BadInput) as caught:
        taken_in(tmp_path / "ws", root)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def _with_args(root: Path, args: dict[str, Any]) -> None:
    folder = write_megatron(root, HF, random_model(HF))
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    vars(content["args"]).update(args)
    torch.save(content, path)


def test_what_the_person_says_is_true(tmp_path: Path) -> None:
    root = tmp_path / "megatron"
    write_megatron(root, HF, random_model(HF), model_name="codellama")
    write_small_tokenizer(root)
    assert taken_in(tmp_path / "ws", root, config={"rope_theta": 1e6})[0]["rope_theta"] == 1e6


def test_a_falcon_that_was_cut_through_its_heads(tmp_path: Path) -> None:
    """The reference's tool does so without a word where there is one key/value head."""
    root = tmp_path / "megatron"
    write_megatron(root, in_llama_s_words(FALCON), random_model(FALCON), tp=2)
    write_small_tokenizer(root)
    with pytest.raises(BadInput, match=r"tp=2 cannot share out num_attention_heads=4 with num_key_value_heads=1 "
                       r"and intermediate_size=48 in Megatron-LLM, whose ranks hold whole .* Legal here: 1$"):  # fmt: skip
        taken_in(tmp_path / "ws", root)


def test_ranks_that_disagree(tmp_path: Path) -> None:
    root = tmp_path / "megatron"
    folder = write_megatron(root, HF, random_model(HF), tp=2)
    write_small_tokenizer(root)
    path = folder / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["language_model"]["encoder"]["layers.2.input_layernorm.weight"] += 1
    torch.save(content, path)
    with pytest.raises(
        BadInput, match=r"mp_rank_01/model_optim_rng.pt: encoder.layers.2.input_layernorm.weight differs from that of "
        "mp_rank_00/model_optim_rng.pt: both hold copies"
    ):  # fmt: skip
        taken_in(tmp_path / "ws", root)


def test_damaged_checkpoints_of_megatron(tmp_path: Path) -> None:
    root = tmp_path / "megatron"
    folder = write_megatron(root, HF, random_model(HF), pp=2)
    write_small_tokenizer(root)
    tracker = root / "latest_checkpointed_iteration.txt"
    for text, message in (
        ("soon", "latest_checkpointed_iteration.txt: says 'soon'; it must be release or the number of an iteration"),
        ("7", "latest_checkpointed_iteration.txt: says 7, and there is no iter_0000007. There is: release"),
    ):
        tracker.write_text(text)
        with pytest.raises(BadInput, match=message):
            taken_in(tmp_path / "ws", root)
    tracker.write_text("release")
    torch.save({"a": torch.ones(1)}, folder / "mp_rank_00_001" / "model_optim_rng.pt")
    with pytest.raises(BadInput, match=r"mp_rank_00_001/model_optim_rng.pt: has no dictionary by name at model"):
        taken_in(tmp_path / "ws", root)
    (folder / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(BadInput, match=r"mp_rank_00_001: has no model_optim_rng.pt"):
        taken_in(tmp_path / "ws", root)
    shutil.rmtree(folder / "mp_rank_00_001")
    with pytest.raises(BadInput, match=r"say 1 tensor and 2 pipeline parallel ranks, and it holds the files of mp_rank_00_000"):
        taken_in(tmp_path / "ws", root)
    (folder / "mp_rank_00_000" / "model_optim_rng.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(BadInput, match=r"mp_rank_00_000/model_optim_rng.pt: is no intact PyTorch file"):
        taken_in(tmp_path / "ws", root)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'touched'}",))

    root = tmp_path / "megatron"
    write_megatron(root, HF, random_model(HF), extra={"rng_state": [{"x": Touch()}]})
    write_small_tokenizer(root)
    with pytest.raises(
        BadInput, match=r"model_optim_rng.pt: names posix.system, which is none of the tensors, arguments and enums"
    ):
        taken_in(tmp_path / "ws", root)
    assert not (tmp_path / "touched").exists()
