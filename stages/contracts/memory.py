"""What training takes of memory, told to people before it starts. See `megatron_core_impl.memory` for what is counted."""

from dataclasses import fields

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.memory import Device, MemoryEstimate, estimate
from stages.contracts import words
from stages.contracts.train_settings import LayoutSettings, TrainSettings


def expected(
    model: ModelConfig, layout: LayoutSettings, train: TrainSettings, *, device: Device = "cuda", rank: int | None = None
) -> MemoryEstimate:
    """The worst moment of the largest step.

    Args:
        rank: of the process; default: the one that needs most.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    settings = train.train_config()
    return estimate(
        model, layout.layout(),
        precision=settings.precision, micro_batch_size=settings.micro_batch_size, sequence_length=settings.sequence_length,
        num_microbatches=settings.batches.sizes[-1] // (settings.micro_batch_size * layout.dp),
        optimizer=settings.optimizer_settings, recompute=settings.recompute_settings, dropout=settings.dropout_settings,
        rank=rank, device=device,
    )  # fmt: skip


def described(found: MemoryEstimate) -> str:
    """One line: the sum, and what it consists of. Terms below one percent are left out."""
    sizes = {field.name.replace("_", " "): getattr(found, field.name) for field in fields(found) if field.name != "in_flight"}
    terms = " + ".join(f"{name} {words.size(value)}" for name, value in sizes.items() if value >= found.total / 100)
    return f"{words.size(found.total)} = {terms}"


def shortage(found: MemoryEstimate, available: int, layout: LayoutSettings, train: TrainSettings) -> str | None:
    """What to lower where a GPU has fewer bytes than a process is expected to need; None where it has enough."""
    if found.total <= available:
        return None
    ways = [f"lower train.micro_batch_size (now {train.micro_batch_size})"] if train.micro_batch_size > 1 else []
    ways += [f"set train.recompute to full (now {train.recompute})"] if train.recompute != "full" else []
    ways += [f"raise layout.tp (now {layout.tp}) or layout.pp (now {layout.pp})"]
    return (
        f"needs about {words.size(found.total)}, and its GPU has {words.size(available)}: it will probably run out of memory. "
        f"Then {', or '.join(ways)}"
    )
