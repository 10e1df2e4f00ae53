"""The work of convert: which tensors a Hugging Face folder must hold, and how they become canonical."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.proven import NotEqual, same_bytes
from megatron_core_impl.checkpoint.reshard import list_names, reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import WeightsReader, count_bytes, open_weights
from megatron_core_impl.checkpoint.slicing import row_blocks, whole
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.json_files import read_json
from megatron_core_impl.models import families
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from megatron_core_impl.parity.tensors import proven
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.specs import ConvertSpec
from stages.linked_weights import files_of, is_canonical, link_files
from stages.outcomes import BadInput, GateFailed
from stages.stored_dtypes import listed, other_dtypes

FLOATS = ("float32", "bfloat16", "float16", "float64")
BUFFERS = ".inv_freq"  # old transformers saved these tables of rotary embeddings; they follow from config.json
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip


def convert(spec: ConvertSpec, ctx: Context, model: a.ModelArtifact, folder: Path) -> a.WeightsArtifact:
    """Convert a model, whose files are in a folder below `folder`, into the scratch folder.

    Raises:
        BadInput: its weights are not those that config.json describes.
        GateFailed: what was written is not what was read.
    """
    allow_pickle = bool(model.spec.get("model", {}).get("allow_pickle", False))
    try:
        config = _read_config(folder / "files" / "config.json", model.model)
        files = open_weights(folder / "files", allow_pickle=allow_pickle)
        _check(files, config)
        table = invert(families.family_of(config).hf_tensors(config))
        source = Rearranged(files, table)
        added = _added_tokens(spec, folder / "files")
        # As many rows as the model has, unless ids lie beyond.
        grown = replace(config, vocab_size=max([config.vocab_size, *(number + 1 for number in added.values())]))
        specs = families.tensors(grown)
        vocabulary = Grown(source, (EMBEDDING, HEAD), grown.vocab_size, spec.new_rows)
        dtype = model.model.dtype
        if others := other_dtypes(vocabulary, [tensor.name for tensor in specs], dtype):
            ctx.warn(
                f"the weights are {dtype}, but {listed(others)} are among them. Training starts from what is there; the "
                f"trained model will be {dtype}. To round all of them before: model.dtype: {dtype}"
            )
        hard_linked: list[str] = []
        if is_canonical(files, specs, table):
            hard_linked = link_files(files, ctx.scratch, specs, files_of(model))
        else:
            reshard(vocabulary, ctx.scratch, specs, Layout(), progress=ctx.progress)
    except WeightsError as error:
        raise BadInput(str(error)) from error
    except NotEqual as error:
        raise GateFailed(str(error)) from error
    written = open_weights(ctx.scratch)
    size = count_bytes(written, (tensor.name for tensor in specs))
    new = grown.vocab_size - config.vocab_size
    facts = {
        "vocab_size": grown.vocab_size,
        "parameters": families.count_parameters(grown),
        "added_tokens": added,
        "new_rows": spec.new_rows if new else None,
    }
    rows = f", and {new:,} row{'s' if new > 1 else ''} for added tokens" if new else ""
    return ctx.artifact(
        a.WeightsArtifact,
        figure=f"{len(specs):,} tensors, {words.size(size)}, bit for bit{rows}{', hard-linked' if hard_linked else ''}",
        metrics={"hard_linked": hard_linked, "tensors": proven(written, vocabulary, specs).report()},
        digests={name: digest.blake3 for name, digest in written.index.files.items()},
        model=model.model.model_copy(update=facts),
        tp=1,
        pp=1,
        tensors=len(specs),
        bytes=size,
        other_dtypes=others,
    )


def _added_tokens(spec: ConvertSpec, files: Path) -> dict[str, int]:
    """The added tokens and their ids, as preprocess numbers them."""
    if not spec.added_tokens:
        return {}
    try:
        return load_tokenizer(files, spec.tokenizer, added_tokens=spec.added_tokens).added_tokens
    except ValueError as error:
        raise BadInput(f"model.added_tokens: {error}") from error


def _read_config(path: Path, facts: a.ModelFacts) -> ModelConfig:
    """The model of config.json, which must be the one that the artifact's facts describe."""
    try:
        hf = read_json(path)
    except ValueError as error:
        raise BadInput(str(error)) from error
    try:
        config = families.config_from_hf(hf)
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
        if (dtype := source.dtype(name).name) not in FLOATS:
            raise BadInput(
                f"{source.folder}: {name} is stored as {dtype}: quantized weights cannot "
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
        if not all(
            same_bytes(source.read_bytes(name, rows), source.read_bytes(embedding, rows))
            for rows in row_blocks(whole(source.shape(embedding)), source.dtype(embedding).itemsize)
        ):
            raise BadInput(
                f"{source.folder}: {name} differs from {embedding}, and config.json says tie_word_embeddings: true. "
                "Set it to false there if the model has an output layer of its own"
            )
    return copies
