"""Checkpoints in the forms of Meta and Megatron-LLM, made of Hugging Face tensors by formulas of their own."""

import json
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from download_runs import model_spec
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_core_impl.checkpoint.proven import same_bits
from megatron_core_impl.models import families
from stages import download, runtime
from stages.contracts import artifacts as a

Tensors = dict[str, Tensor]

HF: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA1 = HF | {"rms_norm_eps": 1e-6}
MHA = HF | {"num_key_value_heads": 4, "rope_theta": 1e6}  # Code Llama's
SAID = {"max_position_embeddings": 64}  # what a checkpoint of Meta does not tell
MISTRAL = HF | {"model_type": "mistral", "sliding_window": 4096}
FALCON: dict[str, Any] = {
    "model_type": "falcon", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "ffn_hidden_size": 48, "max_position_embeddings": 64, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
FALCON40 = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
WORDS = {"ffn_hidden_size": "intermediate_size", "layer_norm_epsilon": "rms_norm_eps"}


def in_llama_s_words(hf: dict[str, Any]) -> dict[str, Any]:
    config = families.config_from_hf(hf)
    return {WORDS.get(name, name): value for name, value in hf.items()} | {"num_key_value_heads": config.num_key_value_heads}


def taken_in(workspace: Path, source: Path, **settings: Any) -> tuple[dict[str, Any], Tensors, a.ModelArtifact]:
    """config.json, tensors and artifact of what download makes."""
    spec = model_spec(workspace, source, **settings)
    artifact = runtime.execute(spec, download.run)
    assert isinstance(artifact, a.ModelArtifact)
    files = spec.folder / "files"
    return json.loads((files / "config.json").read_text()), load_file(files / "model.safetensors"), artifact


def check_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def write_small_tokenizer(folder: Path, vocab_size: int = 250) -> None:
    """`tokenizer.json` of a byte-level BPE for which 256 rows are enough: it knows the bytes of this file only."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer._tokenizer.train_from_iterator(
        Path(__file__).read_text().splitlines(True),
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def interleaved(w: Tensor, head_dim: int) -> Tensor:
    """Rows of heads in Meta's order, as its own code has it: the inverse of `permute` in transformers' conversion script."""
    return w.view(-1, 2, head_dim // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


# ── Meta ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_meta(folder: Path, hf: dict[str, Any], tensors: Tensors, shards: int = 1, *, cuts: str = "columns") -> None:
    """`params.json` and `consolidated.NN.pth`, cut as Llama 1 and 2 (embedding by columns) or Llama 3 (by rows) are."""
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    params = {
        "dim": hf["hidden_size"], "n_layers": hf["num_hidden_layers"], "n_heads": hf["num_attention_heads"],
        "norm_eps": hf["rms_norm_eps"], "multiple_of": 256, "vocab_size": -1,
    }  # fmt: skip
    if hf["num_key_value_heads"] != hf["num_attention_heads"]:
        params["n_kv_heads"] = hf["num_key_value_heads"]
    if hf.get("rope_theta", 1e4) != 1e4:
        params["rope_theta"] = hf["rope_theta"]
    (folder / "params.json").write_text(json.dumps(params))
    whole: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (tensors["model.embed_tokens.weight"], 1 if cuts == "columns" else 0),
        "norm.weight": (tensors["model.norm.weight"], None),
        "output.weight": (tensors["lm_head.weight"], 0),
    }
    for n in range(hf["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{n}."): t for name, t in tensors.items() if f".layers.{n}." in name}
        whole |= {
            f"layers.{n}.attention.wq.weight": (interleaved(layer["self_attn.q_proj.weight"], head_dim), 0),
            f"layers.{n}.attention.wk.weight": (interleaved(layer["self_attn.k_proj.weight"], head_dim), 0),
            f"layers.{n}.attention.wv.weight": (layer["self_attn.v_proj.weight"], 0),
            f"layers.{n}.attention.wo.weight": (layer["self_attn.o_proj.weight"], 1),
            f"layers.{n}.feed_forward.w1.weight": (layer["mlp.gate_proj.weight"], 0),
            f"layers.{n}.feed_forward.w2.weight": (layer["mlp.down_proj.weight"], 1),
            f"layers.{n}.feed_forward.w3.weight": (layer["mlp.up_proj.weight"], 0),
            f"layers.{n}.attention_norm.weight": (layer["input_layernorm.weight"], None),
            f"layers.{n}.ffn_norm.weight": (layer["post_attention_layernorm.weight"], None),
        }
    for shard in range(shards):
        content = {
            name: (t if dim is None else t.chunk(shards, dim)[shard]).contiguous().clone() for name, (t, dim) in whole.items()
        }
        content["rope.freqs"] = torch.ones(head_dim // 2)
        torch.save(content, folder / f"consolidated.{shard:02d}.pth")


# ── Megatron-LLM ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_megatron(
    root: Path, hf: dict[str, Any], tensors: Tensors, *, tp: int = 1, pp: int = 1, vpp: int = 1, dialect: str = "training",
    iteration: int | str = "release", rows: int | None = None, extra: dict[str, Any] | None = None, **args: Any,
) -> Path:  # fmt: skip
    """A checkpoint of a Llama or Mistral, or of a Falcon under canonical names; returns the folder of the iteration.

    Args:
        rows: of the vocabulary, padding included: the last row repeated.
        extra: further content of every file.
        args: arguments that differ.
    """
    heads, kv_heads, layers = hf["num_attention_heads"], hf["num_key_value_heads"], hf["num_hidden_layers"]
    head_dim, is_gated = hf["hidden_size"] // heads, "model.layers.0.mlp.gate_proj.weight" in tensors
    arguments = {
        "num_layers": layers, "hidden_size": hf["hidden_size"], "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads, "num_attention_heads_kv": kv_heads,
        "max_position_embeddings": hf["max_position_embeddings"], "seq_length": hf["max_position_embeddings"],
        "layernorm_epsilon": hf["rms_norm_eps"], "use_rms_norm": is_gated,
        "glu_activation": "swiglu" if is_gated else None, "tie_embed_logits": "lm_head.weight" not in tensors,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "position_embedding_type": "rotary",
        "parallel_attn": not is_gated, "rope_theta": hf.get("rope_theta", 1e4),
        **({"num_layers_per_virtual_pipeline_stage": layers // pp // vpp} if vpp > 1 else {}), **args,
    }  # fmt: skip
    folder = root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    for p in range(pp):
        for t in range(tp):
            rank = folder / (f"mp_rank_{t:02d}_{p:03d}" if pp > 1 else f"mp_rank_{t:02d}")
            rank.mkdir(parents=True)
            content: dict[str, Any] = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": iteration}
            for chunk in range(vpp):
                stage, size = chunk * pp + p, layers // (pp * vpp)
                part = _megatron_stage(
                    tensors, range(stage * size, (stage + 1) * size), layers, kv_heads, head_dim, tp, t, rows
                )
                content["model" if vpp == 1 else f"model{chunk}"] = _nested(part, dialect)
            torch.save(content | (extra or {}), rank / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def _megatron_stage(
    tensors: Tensors, layers: range, total: int, kv_heads: int, head_dim: int, tp: int, t: int, rows: int | None
) -> Tensors:
    def cut(w: Tensor, dim: int) -> Tensor:
        return w.chunk(tp, dim)[t].contiguous().clone()

    def vocabulary(w: Tensor) -> Tensor:
        return cut(w if rows is None else torch.cat([w, w[-1:].expand(rows - len(w), -1)]), 0)

    part: Tensors = {}
    if layers.start == 0:
        part["embedding"] = vocabulary(tensors["model.embed_tokens.weight"])
    for local, n in enumerate(layers):
        of = {name.removeprefix(f"model.layers.{n}."): w for name, w in tensors.items() if f".layers.{n}." in name}
        q, k, v = (of.pop(f"self_attn.{x}_proj.weight") for x in "qkv")
        q, k = interleaved(q, head_dim), interleaved(k, head_dim)
        groups = [w.view(kv_heads, -1, w.shape[1]) for w in (q, k, v)]  # [K, heads of the group · D, H]
        part[f"layers.{local}.attention.query_key_value.weight"] = cut(torch.cat(groups, 1).flatten(0, 1), 0)
        part[f"layers.{local}.attention.dense.weight"] = cut(of.pop("self_attn.o_proj.weight"), 1)
        part[f"layers.{local}.mlp.dense_4h_to_h.weight"] = cut(of.pop("mlp.down_proj.weight"), 1)
        halves = [cut(of.pop(f"mlp.{x}_proj.weight"), 0) for x in ("up", "gate") if f"mlp.{x}_proj.weight" in of]
        part[f"layers.{local}.mlp.dense_h_to_4h.weight"] = torch.cat(halves)
        part |= {f"layers.{local}.{name}": w.clone() for name, w in of.items()}
    if layers.stop == total:
        part |= {
            f"final_layernorm.{kind}": tensors[f"model.norm.{kind}"]
            for kind in ("weight", "bias")
            if f"model.norm.{kind}" in tensors
        }
        if "lm_head.weight" in tensors:
            part["lm_head"] = vocabulary(tensors["lm_head.weight"])
        elif layers.start > 0:
            part["for_head"] = vocabulary(tensors["model.embed_tokens.weight"])
    return part


def _nested(part: Tensors, dialect: str) -> dict[str, Any]:
    is_converted = dialect == "converter"
    model: dict[str, Any] = {}
    if "embedding" in part:
        w = part.pop("embedding")
        model["embedding"] = {"word_embeddings.weight": w} if is_converted else {"word_embeddings": OrderedDict(weight=w)}
    head, copy = part.pop("lm_head", None), part.pop("for_head", None)
    names = {name if is_converted else name.replace(".attention.", ".self_attention."): w for name, w in part.items()}
    model["transformer" if is_converted else "encoder"] = names if is_converted else OrderedDict(names)
    if head is not None:
        model["lm_head"] = head
    return {"language_model": model} | ({} if copy is None else {"word_embeddings_for_head": OrderedDict(weight=copy)})
