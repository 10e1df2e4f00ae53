"""Weights for Megatron-LLM: its own files tensor by tensor, read by plain PyTorch, and back through the import."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import (
    FALCON,
    FALCON40,
    HF,
    MISTRAL,
    check_equal,
    in_llama_s_words,
    taken_in,
    write_megatron,
    write_small_tokenizer,
)
from safetensors.torch import load_file, save_file
from weights_inputs import facts, random_model
from workspaces import make_workspace, read_canonical

from megatron_core_impl.checkpoint.dtypes import Bytes
from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.megatron_llm import open_checkpoint
from megatron_core_impl.checkpoint.proven import NotEqual, same_bits
from megatron_core_impl.checkpoint.restricted_pickle import EnumMember
from megatron_core_impl.checkpoint.sharded import WeightsReader, open_weights
from megatron_core_impl.checkpoint.torch_tensors import TorchTensors
from megatron_core_impl.config import Layout
from megatron_core_impl.models import families
from stages import export, megatron_export, runtime
from stages.context import Context
from stages.contracts import preflight, specs
from stages.contracts.config import ExportSettings, MegatronLLMSettings, PipelineConfig
from stages.megatron_export import check_megatron, write_checkpoint
from stages.outcomes import BadInput

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "megatron_llm"
# What the reference's loader takes from a checkpoint
LOADED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_attention_heads_kv",
    "max_position_embeddings", "tokenizer_type", "padded_vocab_size", "parallel_attn", "parallel_layernorm", "use_rms_norm",
    "glu_activation", "tie_embed_logits", "make_vocab_size_divisible_by", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "kv_channels", "bias_gelu_fusion", "bias_droput_fusion", "sliding_window_size",
    "layernorm_epsilon", "encoder_num_layers",
)  # fmt: skip


def context(tmp_path: Path) -> Context:
    return Context(specs.MergeSpec(workspace=str(tmp_path)), tmp_path)


def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> WeightsReader:
    (tmp_path / "source").mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    return open_weights(tmp_path / "source")


def written(tmp_path: Path, hf: dict[str, Any], tensors: dict[str, torch.Tensor], **layout: int) -> Path:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    root = tmp_path / "exported"
    write_checkpoint(source(tmp_path, tensors), families.config_from_hf(hf), Layout(**layout), dtype, root, context(tmp_path))
    return root


def described(tensors: Any) -> Any:
    """The tree of a file, with what its tensors are for the tensors."""
    if isinstance(tensors, dict):
        return {key: described(value) for key, value in tensors.items()}
    return tensors.dtype, tensors.shape, tensors.stride


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("model", "form", "layout"),
    [("llama2_gqa", "tp1pp1", {}), ("llama2_gqa", "tp2pp2", {"tp": 2, "pp": 2}), ("falcon7", "tp1pp1", {})],
)
def test_the_reference_s_own_files(tmp_path: Path, model: str, form: str, layout: dict[str, int]) -> None:
    hf = json.loads((GOLDEN / model / "hf" / "config.json").read_text())
    config = families.config_from_hf(hf)
    canonical = Rearranged(open_weights(GOLDEN / model / "hf"), invert(families.family_of(config).hf_tensors(config)))
    root = written(tmp_path, hf, {name: canonical.read(name) for name in canonical.names}, **layout)
    theirs, ours = open_checkpoint(GOLDEN / model / form), open_checkpoint(root)
    assert [file.name for file in ours.files] == [file.name for file in theirs.files]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    for mine, golden in zip(ours.files, theirs.files, strict=True):
        assert mine.tensors.keys() == golden.tensors.keys()
        a, b = TorchTensors(mine.archive, mine.tensors), TorchTensors(golden.archive, golden.tensors)
        assert all(same_bits(a.read(name), b.read(name)) for name in a.tensors)
        if form == "tp2pp2":  # the same dialect: the same tree, level by level
            assert described(mine.archive.content["model"]) == described(golden.archive.content["model"])
        for key in ("checkpoint_version", "iteration"):
            assert mine.archive.content[key] == golden.archive.content[key]
    for name in LOADED:
        assert name in ours.args
        if name in theirs.args:
            assert ours.args[name] == theirs.args[name], name
    assert ours.args["position_embedding_type"] == "rotary"  # as its converter writes it; its training, the enum
    assert theirs.args["position_embedding_type"] in ("rotary", EnumMember("megatron.model.enums.PositionEmbeddingType", 1))


CASES = [
    (HF | {"vocab_size": 250}, {"tp": 2, "pp": 2}),
    (HF | {"rope_theta": 1e6}, {"pp": 4}),
    (HF | {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"tp": 2}),
    (MISTRAL, {"tp": 2}),
    (MISTRAL | {"sliding_window": None}, {}),
    (FALCON, {"pp": 2}),
    (FALCON40, {"tp": 2, "pp": 4}),
]


@pytest.mark.parametrize(("hf", "layout"), CASES)
def test_there_and_back(tmp_path: Path, hf: dict[str, Any], layout: dict[str, int]) -> None:
    tensors = random_model(hf)
    root = written(tmp_path, hf, tensors, **layout)
    write_small_tokenizer(root)
    found, _, artifact = taken_in(tmp_path / "ws", root, config={"vocab_size": hf["vocab_size"]})
    check_equal(read_canonical(tmp_path / "ws" / artifact.path / "files"), tensors)
    expected = families.config_from_hf(hf)
    if hf.get("sliding_window", 0) is None:  # a Mistral without a window is a Llama, there
        expected = families.config_from_hf(HF)
    assert families.config_from_hf(found) == expected


def test_plain_pytorch_reads_it(tmp_path: Path) -> None:
    """Every tensor as a formula of the test's own makes it, in a process that knows nothing of ours."""
    folders: list[Path] = []
    for number, (hf, layout) in enumerate((CASES[0], CASES[-2], CASES[-1])):
        tensors, folder = random_model(hf), tmp_path / str(number)
        folder.mkdir()
        rows = 256 if hf["vocab_size"] == 250 else None  # padded to a multiple of 128 · tp
        write_megatron(folder / "expected", in_llama_s_words(hf), tensors, rows=rows, **layout)
        folders += [written(folder, hf, tensors, **layout), folder / "expected"]
    code = """
import sys, torch
from pathlib import Path
def flat(tree, at=""):
    for key, value in tree.items():
        yield from flat(value, f"{at}.{key}") if isinstance(value, dict) else [(f"{at}.{key}", value)]
folders = [sorted(Path(folder).rglob("*.pt")) for folder in sys.argv[1:]]
pairs = [pair for ours, theirs in zip(folders[::2], folders[1::2]) for pair in zip(ours, theirs, strict=True)]
assert len(pairs) == 4 + 2 + 8
for a, b in pairs:
    assert a.parent.name == b.parent.name
    a, b = (torch.load(path, map_location="cpu", weights_only=False) for path in (a, b))
    found, wanted = dict(flat(a["model"])), dict(flat(b["model"]))
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name in found:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name
    assert type(a["args"]).__name__ == "Namespace" and a["args"].num_layers == 4
assert "megatron_core_impl" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=tmp_path)
    for path in (path for folder in folders[::2] for path in folder.rglob("*.pt")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize(
    ("hf", "layout", "message"),
    [
        (FALCON, {"tp": 2}, r"tp=2 cannot share out num_attention_heads=4 with num_key_value_heads=1.*Legal here: 1$"),
        (HF, {"tp": 4}, r"tp=4 cannot share out .* whose ranks hold whole key/value heads. Legal here: 1, 2$"),
        (HF, {"pp": 3}, r"pp=3 does not divide num_hidden_layers=4, as Megatron-LLM needs it. Legal here: 1, 2, 4$"),
        (HF | {"tie_word_embeddings": True}, {}, "Megatron-LLM's Llama has tie_word_embeddings=False, this model has"),
        (HF | {"attention_bias": True}, {}, "Megatron-LLM's Llama has qkv_bias=False, this model has qkv_bias=True"),
        (HF | {"head_dim": 16}, {}, "Megatron-LLM's Llama has head_dim=8, this model has head_dim=16"),
        (HF | {"hidden_act": "gelu"}, {}, "Megatron-LLM's Llama has activation=silu, this model has activation=gelu"),
        (FALCON | {"parallel_attn": False}, {}, "Megatron-LLM's Falcon has is_parallel=True, this model has"),
        (HF | {"model_type": "mistral", "sliding_window": 20}, {}, "has sliding_window=4096 only, this model has 20"),
        (HF | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, {},
         "Megatron-LLM has linear RoPE scaling only, this model has llama3"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_before_anything_starts(
    tmp_path: Path, hf: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    settings = MegatronLLMSettings(**layout)
    with pytest.raises(BadInput, match=f"^export.megatron_llm: .*{message}"):
        check_megatron(settings, facts(families.config_from_hf(hf)))
    check_megatron(None, facts(families.config_from_hf(hf)))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = PipelineConfig.model_validate(
        {"model": {"source": str(tmp_path)}, "data": {"source": "ada/text"}, "train": {"steps": 1, "sequence_length": 32},
         "verify": {"sequence_length": 32}, "export": {"megatron_llm": layout}}
    )  # fmt: skip
    (problem,) = preflight.check(config)
    with pytest.raises(BadInput, match=message):
        raise BadInput(problem)


def test_a_rank_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the source at a time is a block of rows, whatever the size of the model."""
    reader, asked = source(tmp_path, random_model(HF)), []
    real = reader.read_bytes

    def read(*args: Any) -> Bytes:
        part = real(*args)
        asked.append(part.size)
        return part

    monkeypatch.setattr(reader, "read_bytes", read)
    monkeypatch.setattr("megatron_core_impl.checkpoint.slicing.row_blocks.__defaults__", (512,))
    write_checkpoint(reader, families.config_from_hf(HF), Layout(tp=2), "bfloat16", tmp_path / "x", context(tmp_path))
    assert max(asked) <= 512


def test_what_is_written_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = megatron_export.write_torch_file

    def damaged(path: Path, *args: Any) -> None:
        real(path, *args)
        if path.parent.name == "mp_rank_01":
            content = torch.load(path, weights_only=False)
            content["model"]["language_model"]["encoder"]["layers.3.mlp.dense_h_to_4h.weight"][5, 3] += 1
            torch.save(content, path)

    monkeypatch.setattr(megatron_export, "write_torch_file", damaged)
    with pytest.raises(
        NotEqual, match=r"mp_rank_01/model_optim_rng.pt: encoder.layers.3.mlp.dense_h_to_4h.weight is not what the"
    ):
        written(tmp_path, HF, random_model(HF), tp=2)


def test_export_writes_it_beside_the_model(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    checkpoint, merged = workspace.train(workspace.tensors())
    spec = workspace.export_spec(checkpoint, merged, batches=1)
    spec = spec.model_copy(update={"settings": ExportSettings(megatron_llm=MegatronLLMSettings(tp=2))})
    artifact = runtime.execute(spec, export.run)
    assert {"megatron/release/mp_rank_01/model_optim_rng.pt", "megatron/tokenizer.model"} <= artifact.files.keys()
    _, found, _ = taken_in(tmp_path / "ws", artifact.folder(tmp_path) / "megatron", config={"vocab_size": 400})
    check_equal(found, load_file(artifact.folder(tmp_path) / "model" / "model.safetensors"))
