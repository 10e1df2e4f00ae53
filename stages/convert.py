"""Hugging Face weights to canonical ones: the same numbers, bit for bit, each accounted for, and rows for added tokens.

Every tensor that config.json implies must be there with the right shape, and nothing else may be. A family's table tells what
the tensors are called there and how they are fused. Precisions are kept, tensor by tensor; one block of rows is in memory at a
time. What was written is read back and compared with the source.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.index import read_json
from megatron_core_impl.checkpoint.reshard import NotEqual, list_names, reshard, same_bits
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import WeightsReader, WeightsSource, count_bytes, open_weights
from megatron_core_impl.config import Layout, ModelConfig, TensorSpec
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.models import families
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.specs import ConvertSpec
from stages.runtime import BadInput, Context, GateFailed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUFFERS = ".inv_freq"  # old transformers saved these tables of rotary embeddings; they follow from config.json
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip


def run(spec: ConvertSpec, ctx: Context) -> a.WeightsArtifact:
    """Convert the model of a spec."""
    model, folder = ctx.input("model", a.ModelArtifact)
    allow_pickle = bool(model.spec.get("model", {}).get("allow_pickle", False))
    try:
        config = _read_config(folder / "files" / "config.json", model.model)
        files = open_weights(folder / "files", allow_pickle=allow_pickle)
        _check(files, config)
        source = Rearranged(files, invert(families.family_of(config).hf_tensors(config)))
        specs = families.tensors(config)
        _warn_of_other_dtypes(source, specs, model.model.dtype, ctx)
        grown = replace(config, vocab_size=_vocab_size(spec, folder / "files", config))
        specs = families.tensors(grown)
        reshard(Grown(source, (EMBEDDING, HEAD), grown.vocab_size), ctx.scratch, specs, Layout(), progress=ctx.progress)
    except WeightsError as error:
        raise BadInput(str(error)) from error
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    size = count_bytes(open_weights(ctx.scratch), (tensor.name for tensor in specs))
    new = grown.vocab_size - config.vocab_size
    rows = f", and {new:,} row{'s' if new > 1 else ''} for added tokens" if new else ""
    return ctx.artifact(
        a.WeightsArtifact,
        figure=f"{len(specs):,} tensors, {words.size(size)}, bit for bit{rows}",
        model=model.model.model_copy(update={"vocab_size": grown.vocab_size, "parameters": families.count_parameters(grown)}),
        tp=1,
        pp=1,
        tensors=len(specs),
        bytes=size,
    )


def _vocab_size(spec: ConvertSpec, files: Path, config: ModelConfig) -> int:
    """Rows of the embedding once the added tokens have theirs: as many as the model has, unless ids lie beyond."""
    if not spec.added_tokens:
        return config.vocab_size
    try:
        tokenizer = load_tokenizer(files, spec.tokenizer, added_tokens=spec.added_tokens)
    except ValueError as error:
        raise BadInput(f"model.added_tokens: {error}") from error
    return max(config.vocab_size, tokenizer.vocab_size)


def _read_config(path: Path, facts: a.ModelFacts) -> ModelConfig:
    """The model of config.json, which must be the one that the artifact's facts describe."""
    try:
        config = families.config_from_hf(read_json(path))
    except WeightsError:
        raise
    except ValueError as error:
        raise BadInput(f"{path.parent}: {error}") from error
    in_file = families.family_of(config).hf_fields
    says = {**vars(config), "parameters": families.count_parameters(config)}
    for field, value in says.items():
        if (fact := getattr(facts, field)) != value:
            field = in_file.get(field, field)
            raise BadInput(f"{path}: {field} is {value!r}, the model artifact says {fact!r}: run download again")
    return config


def _check(source: WeightsReader, config: ModelConfig) -> None:
    """Refuse weights that are not exactly the tensors of the model, by name."""
    names = set(source.names)
    expected = families.hf_shapes(config)
    for name, shape in expected.items():
        if name in names and source.shape(name) != shape:
            raise BadInput(f"{source.folder}: {_shape_fault(config, name, source.shape(name), shape)}")
    if missing := [name for name in expected if name not in names]:
        raise BadInput(f"{source.folder}: lacks {list_names(missing)}")
    copies = _tied_copies(source, config)
    unexpected = [n for n in source.names if n not in expected and n not in copies and not n.endswith(BUFFERS)]
    if unexpected:
        raise BadInput(
            f"{source.folder}: holds tensors that a {config.family} model of this config.json does not have: "
            f"{list_names(unexpected)}. Is it a plain {config.family} model: no adapter, no quantization, no further head?"
        )
    for name in expected:
        if (dtype := source.dtype(name)) not in FLOATS:
            raise BadInput(
                f"{source.folder}: {name} is stored as {str(dtype).removeprefix('torch.')}: quantized weights cannot "
                "be trained. Start from the model's float32, bfloat16 or float16 weights"
            )


def _shape_fault(config: ModelConfig, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What a tensor of another shape means: the fields of config.json that say otherwise."""
    if len(shape) != len(expected):
        return f"{name} has shape {list(shape)}, config.json says {list(expected)}"
    dim = next(dim for dim, size in enumerate(shape) if size != expected[dim])
    in_file = families.family_of(config).hf_fields
    fields = ", ".join(f"{in_file.get(field, field)}={getattr(config, field)}" for field in _fields_behind(config, name, dim))
    return (
        f"{name} has shape {list(shape)}, config.json says {list(expected)}: "
        f"dim {dim} is {shape[dim]}, and {expected[dim]} by {fields}"
    )


def _fields_behind(config: ModelConfig, name: str, dim: int) -> list[str]:
    """The fields that decide a dim of a tensor: those that move it when they change. The family's own table is asked."""

    def size(of: ModelConfig) -> int:
        return families.hf_shapes(of)[name][dim]

    found = []
    for field in SIZES:
        for value in (2 * getattr(config, field), 1):  # some fields must divide others
            try:
                changed: dict[str, Any] = {field: value}
                other = replace(config, **changed)
            except ValueError:
                continue
            if size(other) != size(config):
                found.append(field)
            break
    return found


def _tied_copies(source: WeightsReader, config: ModelConfig) -> set[str]:
    """Tensors beside those of a tied model that repeat its embedding: some writers store the output layer as well."""
    if not config.tie_word_embeddings:
        return set()
    untied = families.hf_shapes(replace(config, tie_word_embeddings=False))
    copies = (untied.keys() - families.hf_shapes(config).keys()) & set(source.names)
    embedding = next(iter(untied))  # tensors are in the order of the forward pass
    for name in copies:
        if not same_bits(source.read(name), source.read(embedding)):
            raise BadInput(
                f"{source.folder}: {name} differs from {embedding}, and config.json says tie_word_embeddings: true. "
                "Set it to false there if the model has an output layer of its own"
            )
    return copies


def _warn_of_other_dtypes(source: WeightsSource, specs: Sequence[TensorSpec], dtype: str, ctx: Context) -> None:
    stored: Counter[str] = Counter()
    for tensor in specs:
        stored[str(source.dtype(tensor.name)).removeprefix("torch.")] += prod(tensor.shape)
    if set(stored) != {dtype}:
        kinds = ", ".join(f"{count:,} in {name}" for name, count in stored.most_common())
        ctx.warn(f"config.json says {dtype}, the weights are {kinds}. They are kept so; the trained model will be {dtype}")


if __name__ == "__main__":
    runtime.main("convert", run, __doc__)
