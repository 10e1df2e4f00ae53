"""How long a training is: steps, tokens and epochs, of which a person gives one and the others follow."""

from typing import NamedTuple

from stages.contracts.train_settings import TrainSettings
from stages.contracts.words import count, short


class Length(NamedTuple):
    """What a training goes through."""

    steps: int
    tokens: int
    epochs: float | None  # None: how many tokens an epoch has is not known yet


def length_of(train: TrainSettings, tokens_per_epoch: int | None) -> Length | None:
    """The length; None where it is given in epochs and these are not known yet.

    Args:
        tokens_per_epoch: that training takes from the datasets; None: not known yet.

    Raises:
        ValueError: it is less than one step, or does not go with the other settings.
    """
    if train.epochs is not None and tokens_per_epoch is None:
        return None
    config = train.train_config(tokens_per_epoch)
    tokens = config.samples * config.sequence_length
    return Length(config.steps, tokens, tokens / tokens_per_epoch if tokens_per_epoch else None)


def described(train: TrainSettings, tokens_per_epoch: int | None) -> str:
    """One line, as of `length_of`: 500 steps × 1,000 × 1,024 = 512 M tokens = 1.02 epochs."""
    sizes = train.batches().sizes
    batch = f"{count(sizes[0])} … {count(sizes[-1])}" if len(sizes) > 1 else count(sizes[0])
    cut = f"{batch} × {count(train.sequence_length)}"
    length = length_of(train, tokens_per_epoch)
    if length is None:
        return f"{train.epochs:g} epochs, in steps of {cut} tokens"
    line = f"{count(length.steps)} steps × {cut} = {short(length.tokens)} tokens"
    return line if length.epochs is None else f"{line} = {length.epochs:.3g} epochs"
