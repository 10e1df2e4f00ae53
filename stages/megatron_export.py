"""Trained weights as a checkpoint of Megatron-LLM, for whoever wants to go on there: `megatron/` beside `model/`.

Each rank's file is written tensor by tensor, a block of rows in memory at a time, with the arguments that the reference's
loader takes from a checkpoint and those that it forgets. The vocabulary is padded as there: the last row repeated. Then the
files are read as any checkpoint of Megatron-LLM is, and compared with the weights, bit for bit.
"""

from pathlib import Path

from megatron_core_impl.checkpoint import megatron_llm as files
from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.proven import NotEqual
from megatron_core_impl.checkpoint.ranks import StoredRank, blocks, open_ranks, prove_ranks, rank_tensors
from megatron_core_impl.checkpoint.reshard import check_tensors
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.checkpoint.torch_tensors import TorchTensors
from megatron_core_impl.checkpoint.torch_writer import TensorToCome, write_torch_file
from megatron_core_impl.config import Layout, ModelConfig, padded_vocab_size
from megatron_core_impl.models import families
from megatron_core_impl.models import megatron_llm as form
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.config import MegatronLLMSettings
from stages.model_files import TOKENIZER_FILES, copy_file
from stages.outcomes import BadInput, GateFailed

FOLDER = "megatron"


def check_megatron(settings: MegatronLLMSettings | None, model: a.ModelFacts) -> None:
    """Refuse what Megatron-LLM cannot hold, before anything is written.

    Raises:
        BadInput: naming the field of the model or the setting.
    """
    if settings is None:
        return
    try:
        form.args_of(ModelConfig(**model.config_fields()), Layout(tp=settings.tp, pp=settings.pp), model.dtype)
    except ValueError as error:
        raise BadInput(f"export.megatron_llm: {error}") from error


def write_megatron(
    ctx: Context, settings: MegatronLLMSettings | None, model: a.ModelFacts, weights: Path, tokenizer: Path
) -> None:
    """Write a checkpoint of Megatron-LLM, where one is asked for.

    Args:
        weights: folder of the canonical weights.
        tokenizer: folder with the tokenizer's files.

    Raises:
        BadInput: the weights are not those of the model.
        GateFailed: what was written is not what the weights are.
    """
    if settings is None:
        return
    config, layout = ModelConfig(**model.config_fields()), Layout(tp=settings.tp, pp=settings.pp)
    root = ctx.scratch / FOLDER
    try:
        source = open_weights(weights)
        check_tensors(source, families.tensors(config))
        write_checkpoint(source, config, layout, model.dtype, root, ctx)
    except NotEqual as error:
        raise GateFailed(f"{FOLDER}/{error}") from error
    except ValueError as error:
        raise BadInput(f"inputs.weights: {error}") from error
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            copy_file(tokenizer / name, root / name)


def write_checkpoint(
    source: WeightsSource, config: ModelConfig, layout: Layout, dtype: str, root: Path, ctx: Context
) -> None:  # fmt: skip
    """Write canonical weights as a released checkpoint of a layout, and prove every bit of it by reading it back."""
    args = form.args_of(config, layout, dtype)
    rows = padded_vocab_size(config.vocab_size, layout.tp)
    padded = Grown(source, (EMBEDDING, HEAD), rows, "last")
    for rank in range(layout.world_size):
        pp_rank, _, tp_rank = layout.coordinates(rank)
        path = files.rank_path(root, layout, pp_rank, tp_rank)
        path.parent.mkdir(parents=True)
        tensors = rank_tensors(padded, form.stored_by(config, rows, layout, pp_rank, tp_rank))
        model = files.nested(
            {name: TensorToCome(name, tensors.dtype(name).torch, tensors.shape(name)) for name in tensors.names}
        )
        content = {"args": args, "checkpoint_version": files.VERSION, "iteration": files.RELEASE, "model": model}
        write_torch_file(path, content, lambda name, of=tensors: blocks(of, name))  # type: ignore[misc]
        ctx.progress(rank + 1, layout.world_size, f"writing {path.parent.name} for Megatron-LLM")
    (root / files.TRACKER).write_text(files.RELEASE)
    written = files.open_checkpoint(root)
    ranks = [
        StoredRank(
            file.name, TorchTensors(file.archive, file.tensors),
            form.stored_by(config, rows, written.layout, file.pp_rank, file.tp_rank, file.chunk),
        )
        for file in written.files
    ]  # fmt: skip
    open_ranks(root, {name: padded.shape(name) for name in padded.names}, ranks)
    prove_ranks(padded, ranks, ctx.progress)
