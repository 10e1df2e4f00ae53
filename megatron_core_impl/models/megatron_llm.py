"""Megatron-LLM's form of a model (https://github.com/epfLLM/Megatron-LLM): names, arguments, what it holds. No torch in here.

Its Llama, Code Llama, Mistral and Falcon are one network, described by the arguments that lie in every checkpoint. Some of
these are what the program was started with, not what the model needs: its resharding tool starts anew and knows nothing of
rope_theta, rope_scaling_factor, layernorm_epsilon and sliding_window_size, and its training does not restore the first three.
So where the arguments contradict what the kind of model has, the person says what is true (`model.config`).
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_core_impl.checkpoint.megatron_llm import EMBEDDING, EMBEDDING_FOR_HEAD
from megatron_core_impl.checkpoint.restricted_pickle import EnumMember
from megatron_core_impl.config import VOCAB_MULTIPLE, Layout, ModelConfig, RankForm, is_finite, padded_vocab_size
from megatron_core_impl.models.forms import Form, evenly_cut, rank_form
from megatron_core_impl.shown import shown

FORM = Form(
    words={
        "model.embed_tokens.weight": EMBEDDING, "lm_head.weight": "lm_head", "model": "encoder", "norm": "final_layernorm",
        "self_attn": "self_attention", "o_proj": "dense", "down_proj": "dense_4h_to_h",
    },
    fused={"query_key_value": ("q_proj", "k_proj", "v_proj"), "dense_h_to_4h": ("up_proj", "gate_proj")},
    is_interleaved=True,
)  # fmt: skip

_WINDOW = 4096  # its Mistral has this one, whatever is asked for
# What the kinds of models have whose arguments a checkpoint may have lost, in config.json's words
_USUAL: dict[str, dict[str, float]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4}, "llama2": {"rms_norm_eps": 1e-5, "rope_theta": 1e4},
    "codellama": {"rms_norm_eps": 1e-5, "rope_theta": 1e6}, "mistral": {"rms_norm_eps": 1e-5, "rope_theta": 1e4},
    "falcon": {"layer_norm_epsilon": 1e-5, "rope_theta": 1e4},
}  # fmt: skip


def stored_by(config: ModelConfig, rows: int, layout: Layout, pp_rank: int, tp_rank: int, chunk: int = 0) -> RankForm:
    """What a rank's file stores of a model whose vocabulary is padded to `rows`.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    check_layout(config, layout)
    form = rank_form(FORM, evenly_cut(config, rows), layout, pp_rank, tp_rank, chunk)
    if pp_rank == 0 and chunk == 0:
        return form
    # A tied output layer of a pp rank other than the embedding's is a copy, under a name of its own
    table = (replace(each, name=EMBEDDING_FOR_HEAD) if each.name == EMBEDDING else each for each in form.table)
    return replace(form, table=tuple(table))


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Refuse a layout that its network cannot run; its own tool cuts such a model without a word.

    Raises:
        ValueError: naming the legal values.
    """
    heads, kv_heads, ffn = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if kv_heads % layout.tp or ffn % layout.tp:
        legal = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and ffn % n == 0)
        raise ValueError(
            f"tp={layout.tp} cannot share out num_attention_heads={heads} with num_key_value_heads={kv_heads} and "
            f"intermediate_size={ffn} in Megatron-LLM, whose ranks hold whole key/value heads. Legal here: {legal}"
        )
    layers, stages = config.num_hidden_layers, layout.pp * layout.vpp
    if layers % stages:
        legal = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise ValueError(
            f"pp={stages} does not divide num_hidden_layers={layers}, as Megatron-LLM needs it. Legal here: {legal}"
        )


# ── From arguments to a configuration ───────────────────────────────────────────────────────────────────────────────────────


def hf_from_args(args: Mapping[str, Any], vocab_size: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that a checkpoint's arguments describe.

    Args:
        vocab_size: rows of the stored embedding.
        said: fields of config.json that the person gives; they replace what is found.

    Raises:
        ValueError: an argument is missing, asks for something else than these models, or contradicts what the model's kind
            has; the message names the argument and the field of config.json.
    """
    kind = _kind(args)
    sizes = {name: _argument(args, name) for name in ("num_layers", "hidden_size", "num_attention_heads")}
    hidden_size, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if args.get("kv_channels") not in (None, hidden_size // heads):
        raise ValueError(
            f"args.kv_channels={shown(args['kv_channels'])} is not hidden_size / num_attention_heads, which is all it can run"
        )
    kv_heads = args.get("num_attention_heads_kv") or heads
    ffn = args.get("ffn_hidden_size") or 4 * hidden_size
    factor = args.get("rope_scaling_factor") or 1.0
    common = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": heads, "max_position_embeddings": _argument(args, "max_position_embeddings"),
        "rope_theta": args.get("rope_theta") or 1e4,
        "rope_scaling": None if factor == 1 else {"type": "linear", "rope_type": "linear", "factor": factor},
        "tie_word_embeddings": args.get("tie_embed_logits", True),
    }  # fmt: skip
    eps = args.get("layernorm_epsilon", 1e-5)
    if kind == "falcon":
        is_new = args.get("parallel_layernorm", False) or kv_heads not in (1, heads)
        hf: dict[str, Any] = {
            "architectures": ["FalconForCausalLM"], "model_type": "falcon", **common, "ffn_hidden_size": ffn,
            "new_decoder_architecture": is_new, "num_kv_heads": kv_heads, "multi_query": kv_heads == 1, "parallel_attn": True,
            "layer_norm_epsilon": eps, "alibi": False, "bias": False, "activation": "gelu", "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }  # fmt: skip
        if is_new:
            hf["num_ln_in_parallel_attn"] = 2 if args.get("parallel_layernorm", False) else 1
    else:
        is_mistral = kind == "mistral"
        hf = {
            "architectures": ["MistralForCausalLM" if is_mistral else "LlamaForCausalLM"],
            "model_type": "mistral" if is_mistral else "llama", **common, "intermediate_size": ffn,
            "num_key_value_heads": kv_heads, "rms_norm_eps": eps, "hidden_act": "silu",
            **({"sliding_window": args.get("sliding_window_size") or _WINDOW} if is_mistral else {}),
        }  # fmt: skip
    if hf["model_type"] != "mistral" and args.get("sliding_window_size") is not None:
        raise ValueError(
            f"args.sliding_window_size={shown(args['sliding_window_size'])} is not supported in a {kind}: of its models, only "
            f"Mistral has a window, of {_WINDOW}"
        )
    _refuse_doubtful(kind, args.get("model_name") is not None, hf, said)
    return hf


def is_resharded(args: Mapping[str, Any]) -> bool:
    """Whether the reference's resharding tool wrote a checkpoint: its arguments are new ones, not those of the training."""
    return all(args.get(name) is True for name in ("no_save_optim", "no_load_optim", "use_cpu_initialization")) and (
        args.get("perform_initialization") is False
    )


def _kind(args: Mapping[str, Any]) -> str:
    """Which of its models this is: by name where training wrote it, else by what only one of them has."""
    position = args.get("position_embedding_type")
    position = position.value if isinstance(position, EnumMember) else position
    if position not in ("rotary", 1):
        raise ValueError(
            f"args.position_embedding_type={shown(position)} is not supported: only its models with rotary embeddings are"
        )
    is_falcon = bool(args.get("parallel_attn", False))
    wanted = {
        "use_bias": False, "use_post_ln": False, "apply_residual_connection_post_layernorm": False,
        "use_rms_norm": not is_falcon, "glu_activation": None if is_falcon else "swiglu",
    }  # fmt: skip
    for name, value in wanted.items():
        if (found := args.get(name) or (None if value is None else False)) != value:
            models = "Falcon has" if is_falcon else "Llama, Code Llama and Mistral have"
            raise ValueError(
                f"args.{name}={shown(found)} is not supported where parallel_attn={is_falcon}: Megatron-LLM's {models} "
                f"{name}={value!r}, and only these can be taken in"
            )
    kind = args.get("model_name")
    kinds = {"falcon"} if is_falcon else _USUAL.keys() - {"falcon"}
    if kind is None:
        return "falcon" if is_falcon else "mistral" if args.get("sliding_window_size") else "llama2"
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"args.model_name={shown(kind)} is not supported where parallel_attn={is_falcon}; it must be "
            f"{' or '.join(sorted(kinds))}"
        )
    return kind


def _refuse_doubtful(kind: str, is_named: bool, hf: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """What the arguments lose must be what the model's kind has, or the person says what is true."""
    for name, usual in (_USUAL[kind] | ({"sliding_window": _WINDOW} if kind == "mistral" else {})).items():
        if not is_finite(hf[name]):
            raise ValueError(f"its arguments give {name}={shown(hf[name])}, which must be a finite number")
        # The converter's files name no kind: what can be of any is believed
        if name not in said and hf[name] != usual and (is_named or name == "sliding_window"):
            raise ValueError(
                f"its arguments give {name}={hf[name]:g}, and a {kind} has {usual:g}. Megatron-LLM does not keep this argument "
                f"when it loads or reshards a checkpoint, so say what is true: model.config.{name}: {usual:g} (or "
                f"{hf[name]:g}, if it was trained so)"
            )


def _argument(args: Mapping[str, Any], name: str) -> int:
    if type(value := args.get(name)) is not int or value < 1:
        raise ValueError(f"args.{name}={shown(value)} must be a whole number of at least 1")
    return value


# ── From a configuration to arguments ───────────────────────────────────────────────────────────────────────────────────────


def check_model(config: ModelConfig) -> str:
    """The name that its programs have for a model: `--model_name`.

    Raises:
        ValueError: it has no such model; the message names the field.
    """
    is_falcon = config.family == "falcon"
    wanted: dict[str, Any] = {
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "head_dim": config.hidden_size // config.num_attention_heads,
        **(
            {"activation": "gelu", "is_gated": False, "is_parallel": True, "norm": "layernorm"}
            if is_falcon
            else {"activation": "silu", "is_gated": True, "tie_word_embeddings": False}
        ),
    }
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(
                f"Megatron-LLM's {'Falcon' if is_falcon else 'Llama'} has {name}={value}, this model has {name}={found}"
            )
    if config.rope_scaling is not None and config.rope_scaling.kind != "linear":
        raise ValueError(f"Megatron-LLM has linear RoPE scaling only, this model has {config.rope_scaling.kind}")
    if config.sliding_window not in (None, _WINDOW):
        raise ValueError(f"Megatron-LLM has sliding_window={_WINDOW} only, this model has {config.sliding_window}")
    if config.sliding_window is not None:
        return "mistral"
    if is_falcon:
        return "falcon"
    usual = {name: (values["rms_norm_eps"], values["rope_theta"]) for name, values in _USUAL.items() if name != "falcon"}
    same = [name for name, values in usual.items() if values == (config.norm_eps, config.rope_theta)]
    return same[0] if same and same[0] != "mistral" else "llama2"


def args_of(config: ModelConfig, layout: Layout, dtype: str) -> Namespace:
    """The arguments of a checkpoint: all that its loader takes from one, and all that it should.

    Raises:
        ValueError: it has no such model, or cannot run it in this layout.
    """
    name = check_model(config)
    check_layout(config, layout)
    is_falcon = name == "falcon"
    return Namespace(
        model_name=name,
        num_layers=config.num_hidden_layers,
        encoder_num_layers=config.num_hidden_layers,  # of which its export to Hugging Face asks
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_attention_heads_kv=config.num_key_value_heads,
        kv_channels=config.head_dim,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rotary",
        rope_theta=config.rope_theta,
        rope_scaling_factor=config.rope_scaling.factor if config.rope_scaling else 1.0,
        sliding_window_size=config.sliding_window,
        layernorm_epsilon=config.norm_eps,
        use_rms_norm=not is_falcon,
        glu_activation=None if is_falcon else "swiglu",
        parallel_attn=is_falcon,
        parallel_layernorm=is_falcon and not config.has_shared_norm,
        tie_embed_logits=config.tie_word_embeddings,
        use_bias=False,
        use_post_ln=False,
        apply_residual_connection_post_layernorm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        lima_dropout=False,
        bias_gelu_fusion=False,
        bias_dropout_fusion=False,
        bias_droput_fusion=False,  # as its loader spells it
        use_flash_attn=True,
        make_vocab_size_divisible_by=VOCAB_MULTIPLE,
        padded_vocab_size=padded_vocab_size(config.vocab_size, layout.tp),
        tokenizer_type="FalconTokenizer" if is_falcon else "SentencePieceTokenizer",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        iteration="release",
        consumed_train_samples=0,
        consumed_valid_samples=0,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
    )
