"""Checkpoints of Meta and Megatron-LLM as `model.source`: taken in bit for bit, and all the way through the stages."""

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
    MHA,
    MISTRAL,
    SAID,
    check_equal,
    in_llama_s_words,
    taken_in,
    write_megatron,
    write_meta,
    write_small_tokenizer,
)
from safetensors.torch import load_file
from weights_inputs import random_model
from workspaces import read_canonical, references, sentencepiece_model

from megatron_core_impl.models import families
from stages import convert, download, preprocess, runtime, verify
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import specs
from stages.outcomes import BadInput

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")


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
    """download as a process; what follows, which is as ever, in this one."""
    workspace = root / "ws"
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": line * 8}) + "\n" for line in Path(__file__).read_text().split("\n\n\n"))
    )
    made: dict[str, a.Artifact] = {"model": done(model_spec(workspace, source, **settings))}
    made["data"] = runtime.execute(data_spec(workspace, root / "text.jsonl"), download.run)
    inputs = references({"data": made["data"], "model": made["model"]})
    made["dataset"] = runtime.execute(specs.PreprocessSpec(workspace=str(workspace), inputs=inputs), preprocess.run)
    inputs = references({"model": made["model"]})
    made["weights"] = runtime.execute(specs.ConvertSpec(workspace=str(workspace), inputs=inputs), convert.run)
    inputs = references({name: made[name] for name in ("model", "weights", "dataset")})
    small = c.VerifySettings(batches=1, batch_size=2, sequence_length=48)
    result = runtime.execute(specs.VerifySpec(workspace=str(workspace), inputs=inputs, settings=small), verify.run)
    assert isinstance(result, a.VerificationArtifact)
    return result


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
