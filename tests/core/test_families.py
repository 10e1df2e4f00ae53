"""Families as descriptions: config.json, the tensors on both sides, the named sizes."""

import copy
import math
import subprocess
import sys
from typing import Any

import hf_models
import pytest
import torch
from hf_models import KINDS, described, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_core_impl.checkpoint.foreign import invert
from megatron_core_impl.config import ModelConfig, RopeScaling, Rows, padded_vocab_size
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models import families
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import load_weights

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral"}
QWEN2 = LLAMA | {"model_type": "qwen2"}
FALCON: dict[str, Any] = {
    "model_type": "falcon", "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


# ── Named sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def llama(layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int = 32000, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab, **more,
    }  # fmt: skip


LONG: dict[str, Any] = {"max_position_embeddings": 16384, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 8, "parallel_attn": True}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "llama-7": (llama(32, 4096, 32, 32, 11008), 6_738_415_616),
    "llama-13": (llama(40, 5120, 40, 40, 13824), 13_015_864_320),
    "llama-30": (llama(60, 6656, 52, 52, 17920), 32_528_943_616),
    "llama-65": (llama(80, 8192, 64, 64, 22016), 65_285_660_672),
    "llama2-7": (llama(32, 4096, 32, 32, 11008, max_position_embeddings=4096, rms_norm_eps=1e-5), 6_738_415_616),
    "llama2-13": (llama(40, 5120, 40, 40, 13824, max_position_embeddings=4096, rms_norm_eps=1e-5), 13_015_864_320),
    "llama2-70": (llama(80, 8192, 64, 8, 28672, max_position_embeddings=4096, rms_norm_eps=1e-5), 68_976_648_192),
    "codellama-7": (llama(32, 4096, 32, 32, 11008, 32016, **LONG), 6_738_546_688),
    "codellama-13": (llama(40, 5120, 40, 40, 13824, 32016, **LONG), 13_016_028_160),
    "codellama-34": (llama(48, 8192, 64, 8, 22016, **LONG), 33_743_970_304),
    "mistral-7": (llama(32, 4096, 32, 8, 14336) | {"model_type": "mistral"}, 7_241_732_096),
    "falcon-7": (
        {"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024},
        6_921_720_704,
    ),
    "falcon-40": (
        {"model_type": "falcon", "num_hidden_layers": 60, "hidden_size": 8192, "num_attention_heads": 128, "vocab_size": 65024}
        | FALCON_40B,
        41_303_293_952,
    ),
}


@pytest.mark.parametrize(("hf", "parameters"), SIZES.values(), ids=SIZES)
def test_named_sizes(hf: dict[str, Any], parameters: int) -> None:
    """G18 of the reference, and the model itself, without its memory."""
    config = families.config_from_hf(hf)
    assert families.count_parameters(config) == parameters
    model = Transformer(config, Mesh.single(), dtype=torch.bfloat16, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    padding = padded_vocab_size(config.vocab_size, tp=1) - config.vocab_size  # rows, of the embedding and the output layer
    copies = 1 if config.tie_word_embeddings else 2
    assert sum(p.numel() for p in model.parameters()) == parameters + copies * padding * config.hidden_size


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_transformers(kind: str) -> None:
    """As config.json, written by transformers, describes them, and as our model makes them."""
    theirs = random_model(kind)
    config = described(theirs)
    assert families.hf_shapes(config) == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    ours = Transformer(config, Mesh.single(), dtype=torch.float32, device="meta")
    assert list(ours.sharded_parameters()) == [spec.name for spec in families.tensors(config)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_accounts_for_every_row(kind: str) -> None:
    config = described(random_model(kind))
    table = families.family_of(config).hf_tensors(config)
    canonical = invert(table)
    assert {stacked.name: sum(p.stop - p.start for p in stacked.parts) for stacked in canonical} == {
        spec.name: spec.shape[0] for spec in families.tensors(config)
    }
    assert sorted(invert(canonical), key=str) == sorted(table, key=str)


def test_falcon_fuses_by_key_value_head() -> None:
    """Two groups of two query heads, 16 rows each: q0 q1 k0 v0 q2 q3 k1 v1."""
    config = families.config_from_hf(FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2})
    table = {stacked.name: stacked.parts for stacked in families.family_of(config).hf_tensors(config)}
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    assert table["transformer.h.1.self_attention.query_key_value.weight"] == (
        Rows(q, 0, 32), Rows(k, 0, 16), Rows(v, 0, 16), Rows(q, 32, 64), Rows(k, 16, 32), Rows(v, 16, 32),
    )  # fmt: skip


OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
BARE = [
    {key: value for key, value in LLAMA.items() if key not in OPTIONAL},
    {key: value for key, value in MISTRAL.items() if key not in OPTIONAL},
    QWEN2 | {"num_attention_heads": 32, "use_sliding_window": True, "max_window_layers": 0},
    FALCON,
    FALCON | {"new_decoder_architecture": True},
    FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    FALCON | {"multi_query": False, "parallel_attn": False},
]


@pytest.mark.parametrize("hf", BARE)
def test_missing_fields_are_filled_in_as_transformers_does(hf: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(**hf)
    complete = families.config_from_hf({**theirs.to_dict(), "model_type": hf["model_type"]})
    assert families.config_from_hf(hf) == complete
    assert complete.norm_eps == getattr(theirs, families.family_of(complete).hf_fields["norm_eps"])
    assert complete.max_position_embeddings == theirs.max_position_embeddings
    assert complete.tie_word_embeddings == theirs.tie_word_embeddings
    assert complete.rope_theta == theirs.rope_parameters["rope_theta"]
    if hf["model_type"] == "falcon":
        assert complete.intermediate_size == theirs.ffn_hidden_size
    else:
        assert complete.num_key_value_heads == theirs.num_key_value_heads
        assert complete.sliding_window == getattr(theirs, "sliding_window", None)


def test_old_and_new_spellings_of_a_configuration_mean_the_same() -> None:
    old = families.config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": None})
    new = families.config_from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert old == new
    assert old.rope_theta == 5e5
    old = families.config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}})
    new = families.config_from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})
    assert old == new
    assert old.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(("place", "context"), [({}, 64), ({"original_max_position_embeddings": 16}, 16)])
def test_llama3_scaling(place: dict[str, int], context: int) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **place}
    config = families.config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=context
    )


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_the_context_of_llama3_scaling_is_the_one_beside_it_as_in_transformers(field: str) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf = LLAMA | {"original_max_position_embeddings": 32, field: scaling | {"original_max_position_embeddings": 16}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(hf)))  # only building a model settles it
    theirs = model.config.rope_parameters["original_max_position_embeddings"]
    ours = families.config_from_hf(hf).rope_scaling
    assert ours is not None
    assert ours.original_max_position_embeddings == theirs == 32, "not 16, the one inside"


def test_windows_of_qwen2() -> None:
    def window(**changes: Any) -> int | None:
        return families.config_from_hf(QWEN2 | changes).sliding_window

    assert window(sliding_window=8, max_window_layers=0) is None, "without use_sliding_window there is none"
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=3) is None, "it begins behind the last layer"
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=0) == 8
    assert window(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 3) == 8


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return LLAMA | {"rope_scaling": {"type": kind, **more}}


NEW_FALCON = FALCON | {"new_decoder_architecture": True}


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (LLAMA | {"model_type": "gpt2"}, r"^config\.json: model_type='gpt2' .*Supported: falcon, llama, mistral, qwen2$"),
        (LLAMA | {"model_type": None}, r"^config\.json: model_type=None is not supported"),
        (LLAMA | {"hidden_act": "mish"}, r"^config\.json: hidden_act='mish' is not supported\. Supported: silu, swish, gelu"),
        (LLAMA | {"attention_bias": "yes"}, r"attention_bias='yes' must be true or false"),
        (LLAMA | {"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported: dropout is a setting of the training"),
        (FALCON | {"hidden_dropout": 0.1}, r"hidden_dropout=0\.1 is not supported: .*Set hidden_dropout to 0\.0 there"),
        (scaled("dynamic", factor=4.0), r"rope_type='dynamic' of rope_scaling .*set it to null to train"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type='yarn' of rope_parameters .*attention scores"),
        (scaled("longrope"), r"rope_type='longrope' .*Choose a model with linear or llama3"),
        (scaled("mine"), r"rope_type='mine' .*supported are default, linear and llama3$"),
        (scaled("linear"), r"^config\.json: rope_scaling: factor is missing$"),
        (scaled("linear", factor=0.5), r"rope_scaling: factor=0\.5 must be at least 1"),
        (scaled("linear", factor=math.nan), r"^config\.json: rope_scaling: factor=nan must be a finite number$"),
        (LLAMA | {"rms_norm_eps": math.nan}, r"^config\.json: rms_norm_eps=nan must be a finite number$"),
        (LLAMA | {"rope_theta": math.inf}, r"^config\.json: rope_theta=inf must be a finite number$"),
        (LLAMA | {"rope_theta": 10**400}, r"^config\.json: rope_theta=a number of 1,329 bits must be a finite number$"),
        (LLAMA | {"rms_norm_eps": 0}, r"^norm_eps=0\.0 must be above 0$"),
        (scaled("llama3", factor=8.0), r"^config\.json: rope_scaling: low_freq_factor is missing$"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5 is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        (LLAMA | {"quantization_config": {"bits": 4}}, r"quantization_config is not supported\. Start from the model's unq"),
        (LLAMA | {"intermediate_size": None}, r"^config\.json: intermediate_size is missing$"),
        (LLAMA | {"num_attention_heads": 0}, r"^config\.json: num_attention_heads=0 must be at least 1$"),
        (LLAMA | {"num_hidden_layers": 10**8}, r"^num_hidden_layers=100000000 is impossible: at most 10,000$"),
        (LLAMA | {"num_attention_heads": 7}, r"num_attention_heads=7 does not divide hidden_size=64"),
        (LLAMA | {"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=8"),
        (MISTRAL | {"sliding_window": "all"}, r"sliding_window='all' must be a whole number"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}, r"=2 gives only some of num_hidden_layers=3 .*to false"),
        (FALCON | {"alibi": True}, r"^config\.json: alibi=True is not supported, rotary embeddings are"),
        (FALCON | {"num_attention_heads": 5}, r"num_attention_heads=5 does not divide hidden_size=64"),
        (FALCON | {"num_ln_in_parallel_attn": 2}, r"num_ln_in_parallel_attn=2 .* must be 1 without new_decoder_architecture$"),
        (NEW_FALCON | {"num_ln_in_parallel_attn": 3}, r"num_ln_in_parallel_attn=3 .* must be 1 or 2$"),
        (NEW_FALCON | {"parallel_attn": False}, r"parallel_attn=False is not supported where new_decoder_architecture"),
        (FALCON | {"multi_query": False, "num_kv_heads": 2}, r"num_kv_heads=2 without multi_query .*num_attention_heads=4"),
    ],
)
def test_what_is_not_built_is_refused_by_name(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        families.config_from_hf(hf)


def test_weights_of_another_shape_are_refused() -> None:
    theirs = random_model("llama")
    wrong = dict(theirs.state_dict(), **{"lm_head.weight": torch.ones(200, 48)})
    ours = hf_models.ours_of(theirs)
    message = r"^lm_head\.weight has shape \(200, 48\) in the checkpoint, but \(131, 48\) in the model's configuration$"
    with pytest.raises(ValueError, match=message):
        load_weights(ours, hf_models.InMemory(wrong))


def test_describing_a_model_does_not_import_torch() -> None:
    code = "import sys, megatron_core_impl.models.families, megatron_core_impl.optim; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_of_config_json_are_fields() -> None:
    for family in families.FAMILIES.values():
        assert set(family.hf_fields) <= set(ModelConfig.__dataclass_fields__)
