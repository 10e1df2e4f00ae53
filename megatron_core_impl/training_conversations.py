"""The samples of a job's conversations: the rows of one set for one role, packed or one conversation each. No torch in here."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from megatron_core_impl.data.instruction_dataset import (
    Conversations,
    ConversationSamples,
    Defects,
    Ints,
    PackedConversations,
    Reading,
    packed,
    reference_order,
    split_conversations,
)
from megatron_core_impl.data.packing import Packing
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.train_config import DataSet, Job, TrainConfig

Role = Literal["train", "valid", "test"]
ROLES: tuple[Role, ...] = ("train", "valid", "test")


class ConversationPart(NamedTuple):
    """What a role takes from a set."""

    source: DataSet
    conversations: Conversations
    given: Ints  # numbers of the conversations that are for the role
    chosen: Ints  # of those that are used
    packing: Packing | None  # of these; None: there are none, or they are not packed
    config: TrainConfig
    role: Role

    @property
    def samples_per_epoch(self) -> int:
        """How many samples there are before one is repeated."""
        return len(self.chosen) if self.packing is None else len(self.packing)


def open_set(source: DataSet, job: Job) -> Conversations:
    """The conversations of a set, for all roles.

    Raises:
        ValueError: the files are damaged, or conversations are too long and that is an error.
    """
    config = job.config
    reading = Reading(
        sequence_length=config.sequence_length,
        too_long=config.too_long,
        role_weights=(config.system_weight, config.user_weight, config.assistant_weight),
        header_tokens=job.header_tokens,
    )
    return Conversations(source.prefix, reading, cache=job.cache, fingerprint=source.fingerprint)


def conversation_part(source: DataSet, conversations: Conversations, job: Job, role: Role) -> ConversationPart:
    """What a role takes from a set."""
    config = job.config
    given = np.arange(len(conversations))
    if source.role == "all":
        given = split_conversations(len(conversations), config.split, config.seed)[ROLES.index(role)]
    chosen = conversations.used(given)
    packing = packed(conversations, chosen, job.cache) if config.packing and len(chosen) else None
    read = conversations if role == "train" else conversations.marking_answers()
    return ConversationPart(source, read, given, chosen, packing, config, role)


def open_conversations(part: ConversationPart, num_samples: int) -> Samples:
    """Its samples: at least `num_samples`, over as many epochs as that takes."""
    seed, size = part.config.seed, len(part.conversations)
    if part.packing is not None:
        return PackedConversations(part.conversations, part.packing, num_samples=num_samples, seed=seed)
    if part.source.role != "all":
        return ConversationSamples(part.conversations, reference_order([(part.chosen, num_samples)], seed)[0])
    # The reference draws the orders of all roles from one stream: those before this one come first.
    split = split_conversations(size, part.config.split, seed)
    wanted = {"train": part.config.samples, "valid": part.config.eval_samples, "test": part.config.eval_samples}
    wanted[part.role] = num_samples
    parts = [
        (used, wanted[role] if len(used) else 0)
        for role, chosen in zip(ROLES, split, strict=True)
        for used in [part.conversations.used(chosen)]
    ]
    return ConversationSamples(part.conversations, reference_order(parts, seed, of_split=size)[ROLES.index(part.role)])


def defects_of(conversations: Conversations) -> Defects:
    """Those of a whole set."""
    return conversations.defects(np.arange(len(conversations)))


def told_of_set(source: DataSet, conversations: Conversations) -> str | None:
    """What became of conversations of a set that are not used as they are, for people; None: they all are."""
    found = defects_of(conversations)
    left_out = {
        "too long": found.too_long if conversations.reading.too_long == "drop" else 0,
        "too short": found.too_short,
        "with nothing to learn": found.nothing_to_learn,
    }
    parts = [f"{count:,} {what}, left out" for what, count in left_out.items() if count]
    if found.too_long and conversations.reading.too_long == "truncate":
        parts.insert(0, f"{found.too_long:,} too long, cut off")
    return f"{source.name}: of {len(conversations):,} conversations {'; '.join(parts)}" if parts else None


def told_of_part(part: ConversationPart) -> str:
    """How its conversations fill the rows, for people."""
    line = f"{part.role}: {len(part.chosen):,} conversations of {part.source.name}"
    if part.packing is None:
        return line
    filled = f"{part.packing.efficiency:.1%} full"
    return f"{line}, packed into {len(part.packing):,} samples of {part.config.sequence_length:,}, {filled}"


def why_nothing(parts: Sequence[ConversationPart]) -> str | None:
    """Why nothing is left of what sets have for a role, and what would change that; None: they have nothing for it."""
    reasons = [_why_nothing(part) for part in parts if len(part.given)]
    return "; ".join(reasons) or None


def _why_nothing(part: ConversationPart) -> str:
    found, config = part.conversations.defects(part.given), part.config
    reasons = []
    if found.too_long and config.too_long == "drop":
        reasons.append(
            f"{_all_of(found.too_long, part)} too long and left out (the longest of the set has {part.conversations.longest:,} "
            f"tokens, sequence_length + 1 is {config.sequence_length + 1:,}): raise sequence_length, or set too_long to "
            '"truncate"'
        )
    if found.nothing_to_learn:
        reasons.append(
            f"{_all_of(found.nothing_to_learn, part)} without anything to learn: no label in the first sequence_length + 1 = "
            f"{config.sequence_length + 1:,} tokens has a weight above 0. That is the weight of its role (system_weight="
            f"{config.system_weight:g}, user_weight={config.user_weight:g}, assistant_weight={config.assistant_weight:g}) "
            "times that of its message: raise one of these, or sequence_length"
        )
    if found.too_short:
        reasons.append(f"{_all_of(found.too_short, part)} shorter than two tokens")
    return f"of the {len(part.given):,} that {part.source.name} has for it, {', and '.join(reasons)}"


def _all_of(count: int, part: ConversationPart) -> str:
    return "all are" if count == len(part.given) else f"{count:,} are"
