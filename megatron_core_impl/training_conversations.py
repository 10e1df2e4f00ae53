"""The samples of a job's conversations: the rows of one set for one role, packed or one conversation each. No torch in here."""

from typing import Literal, NamedTuple

import numpy as np

from megatron_core_impl.data.instruction_dataset import (
    Conversations,
    ConversationSamples,
    Ints,
    PackedConversations,
    Reading,
    reference_order,
    split_conversations,
)
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.train_config import DataSet, Job, TrainConfig

Role = Literal["train", "valid", "test"]
ROLES: tuple[Role, ...] = ("train", "valid", "test")


class ConversationPart(NamedTuple):
    """What a role takes from a set."""

    source: DataSet
    conversations: Conversations
    chosen: Ints  # numbers of the conversations
    config: TrainConfig
    role: Role

    @property
    def samples_per_epoch(self) -> int:
        """How many samples there are before one is repeated."""
        return _packed(self, 0).rows_per_epoch if self.config.packing and len(self.chosen) else len(self.chosen)


def conversation_part(source: DataSet, job: Job, role: Role) -> ConversationPart:
    """What a role takes from a set of conversations.

    Raises:
        ValueError: the files are damaged, or conversations are too long and that is an error.
    """
    config = job.config
    reading = Reading(
        sequence_length=config.sequence_length,
        too_long=config.too_long,
        role_weights=(config.system_weight, config.user_weight, config.assistant_weight),
        header_tokens=job.header_tokens,
        marks_answers=role != "train",
    )
    conversations = Conversations(source.prefix, reading)
    chosen = np.arange(len(conversations))
    if source.role == "all":
        chosen = split_conversations(len(conversations), config.split, config.seed)[ROLES.index(role)]
    return ConversationPart(source, conversations, conversations.used(chosen), config, role)


def open_conversations(part: ConversationPart, num_samples: int) -> Samples:
    """Its samples: at least `num_samples`, over as many epochs as that takes."""
    if part.config.packing:
        return _packed(part, num_samples)
    seed, size = part.config.seed, len(part.conversations)
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


def told(part: ConversationPart) -> str:
    """How the conversations fill the rows, for people."""
    conversations, config = part.conversations, part.config
    parts = [f"{part.role}: {len(part.chosen):,} conversations"]
    if config.packing:
        packed = _packed(part, 0)
        parts.append(
            f"packed into {packed.rows_per_epoch:,} samples of {config.sequence_length:,}, {packed.efficiency:.1%} full"
        )
    if conversations.too_long:
        what = "left out" if config.too_long == "drop" else "cut off"
        parts.append(f"{conversations.too_long:,} of the set too long, {what}")
    if conversations.too_short:
        parts.append(f"{conversations.too_short:,} of the set too short")
    return ", ".join(parts)


def _packed(part: ConversationPart, num_samples: int) -> PackedConversations:
    return PackedConversations(part.conversations, part.chosen, num_samples=num_samples, seed=part.config.seed)
