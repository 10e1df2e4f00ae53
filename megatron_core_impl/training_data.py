"""From the datasets of a job to the samples of its training, of its evaluations, and of the test at the end.

A role (train, valid, test) takes from each dataset of role `all` its share of the documents, by `config.split`, and all of each
dataset that is named for the role. Where these are several, they are blended by their weights. Evaluations read no sample twice
and stay within their budget, so a small split is read once, not over and over.

What takes time here, the indices of samples, goes to the job's cache. `prepare` fills it; a worker calls it before it joins a
process group, where the others would wait for it and give up. No torch in here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from megatron_core_impl.data.blend import Blend, blend_order, normalized, samples_of_each
from megatron_core_impl.data.gpt_dataset import GPTDataset, TextSamples, samples_of_tokens
from megatron_core_impl.data.index_cache import cached
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.instruction_dataset import Conversations
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.data.splits import split_documents
from megatron_core_impl.train_config import DataSet, Job
from megatron_core_impl.training_conversations import (
    ROLES,
    ConversationPart,
    Role,
    conversation_part,
    defects_of,
    open_conversations,
    open_set,
    told_of_part,
    told_of_set,
    why_nothing,
)


class Part(NamedTuple):
    """What a role takes from a dataset."""

    source: DataSet
    data: IndexedDataset
    documents: range
    tokens: int


@dataclass(frozen=True)
class TrainingData:
    """The samples of a job by their use."""

    train: Samples  # of all steps
    valid: Samples  # of an evaluation, the same ones each time
    test: Samples | None  # of the one at the end; None: there is no test split
    valid_in_all: int  # samples that there are for evaluations, which may read only some of them


def parts_of(sets: Sequence[DataSet], split: str, role: Role) -> list[Part]:
    """What a role takes from each dataset; from some it may be nothing, or too little for a sample."""
    parts = []
    for source in sets:
        if source.role not in ("all", role):
            continue
        data = IndexedDataset(source.prefix)
        documents = range(len(data)) if source.role == role else split_documents(split, len(data))[ROLES.index(role)]
        tokens = int(data.sizes[documents.start : documents.stop].sum(dtype="int64"))
        parts.append(Part(source, data, documents, tokens))
    return parts


def tokens_per_epoch(job: Job) -> int:
    """The tokens that training takes from all datasets before one is repeated.

    A sample of conversations counts as `sequence_length` tokens with its padding, also where it is one conversation.
    """
    if job.content == "text":
        return sum(part.tokens for part in parts_of(job.sets, job.config.split, "train"))
    samples = sum(offer.per_epoch for offer in _offers(job, "train", _open_sets(job)))
    return samples * job.config.sequence_length + 1  # as of text: the last label is no input


def conversation_figures(job: Job) -> dict[str, Any]:
    """What became of the conversations of all sets together, and how full the rows are that training reads."""
    sets = _open_sets(job)
    defects = [defects_of(conversations) for conversations in sets.values()]
    figures: dict[str, Any] = {
        f"conversations_{name}": sum(getattr(each, name) for each in defects)
        for name in ("too_long", "too_short", "nothing_to_learn")
    }
    parts = [offer.part for offer in _offers(job, "train", sets) if offer.part is not None]
    packings = [part.packing for part in parts if part.packing is not None]
    if rows := sum(map(len, packings)):
        figures["packing_efficiency"] = round(sum(len(each) * each.efficiency for each in packings) / rows, 5)
    return figures


def open_data(job: Job, log: Callable[[str], None] = lambda line: None) -> TrainingData:
    """The samples of a job, its indices from the cache where they are there.

    Args:
        log: told how conversations become samples, and about datasets that give a role nothing.

    Raises:
        ValueError: as `check_data`.
    """
    sets = _open_sets(job)
    for line in (told_of_set(source, conversations) for source, conversations in sets.items()):
        if line is not None:
            log(line)
    offers = _all_offers(job, sets)
    train, valid, test = (_samples(job, role, offers[role], log) for role in ROLES)
    assert train is not None
    assert valid is not None
    return TrainingData(train, valid, test, sum(offer.per_epoch for offer in offers["valid"]))


def check_data(job: Job) -> None:
    """Look whether there is something to train on, and to measure the held-out loss on.

    Raises:
        ValueError: there is not; or files are damaged.
    """
    _all_offers(job, _open_sets(job))


def _nothing(job: Job, role: Role, offers: Sequence["_Offer"]) -> str:
    """Why a role has no samples, and what would give it some."""
    config = job.config
    lacks, shorter = f"the {config.sequence_length + 1:,} tokens of one sample", ""
    if job.content == "conversations":
        lacks = "a conversation"
        if reason := why_nothing([offer.part for offer in offers if offer.part is not None]):
            return f"no dataset has a conversation left for {role}: {reason}"
    else:
        shorter = f", or lower sequence_length (now {config.sequence_length})"
    return (
        f"no dataset has {lacks} for {role}: give more {job.content} or a dataset of role {role}, change split (now "
        f'"{config.split}"){shorter}'
    )


def prepare(job: Job) -> None:
    """Fill the job's cache. Any number of processes may do so at once: one makes an index, the others wait for it.

    Raises:
        ValueError: as `open_data`.
    """
    if job.cache is not None:
        open_data(job)


class _Offer(NamedTuple):
    """What a dataset can give to a role."""

    source: DataSet
    per_epoch: int  # samples before one is repeated
    holds: str  # for people
    open: Callable[[int], Samples]  # of at least so many samples
    part: ConversationPart | None = None  # None: it is text


def _open_sets(job: Job) -> dict[DataSet, Conversations]:
    """A job's sets of conversations; none of text."""
    return {source: open_set(source, job) for source in job.sets} if job.content == "conversations" else {}


def _all_offers(job: Job, sets: Mapping[DataSet, Conversations]) -> dict[Role, list[_Offer]]:
    """What the datasets can give to each role.

    Raises:
        ValueError: nothing for training, or for the evaluation.
    """
    offers = {role: _offers(job, role, sets) for role in ROLES}
    for role in ROLES[:2]:
        if not any(offer.per_epoch for offer in offers[role]):
            raise ValueError(_nothing(job, role, offers[role]))
    return offers


def _offers(job: Job, role: Role, sets: Mapping[DataSet, Conversations]) -> list[_Offer]:
    """What each dataset that is for a role has for it."""
    if job.content == "text":
        return [
            _Offer(
                part.source,
                samples_of_tokens(part.tokens, job.config.sequence_length),
                f"{part.tokens:,} tokens",
                partial(_open_text, part, job),
            )
            for part in parts_of(job.sets, job.config.split, role)
        ]
    offers = []
    for source in job.sets:
        if source.role in ("all", role):
            part = conversation_part(source, sets[source], job, role)
            held = f"{len(part.chosen):,} conversations"
            offers.append(_Offer(source, part.samples_per_epoch, held, partial(open_conversations, part), part))
    return offers


def _samples(job: Job, role: Role, found: Sequence[_Offer], log: Callable[[str], None]) -> Samples | None:
    """The samples of a role; None where no dataset has one."""
    offers = [offer for offer in found if offer.per_epoch]
    if not offers:
        return None
    for offer in found:
        if offer.per_epoch and offer.part is not None:
            log(told_of_part(offer.part))
        if not offer.per_epoch:
            log(
                f"{role}: {offer.source.prefix} has {offer.holds} for it, less than one sample, and is left out; the weights "
                "of the others grow"
            )
    weights = [offer.source.weight for offer in offers]
    wanted = job.config.samples if role == "train" else job.config.eval_samples
    counts = samples_of_each(weights, wanted) if len(offers) > 1 else [wanted]
    if role != "train":  # none is read twice
        counts = [min(count, offer.per_epoch) for count, offer in zip(counts, offers, strict=True)]
    opened = [offer.open(count) for offer, count in zip(offers, counts, strict=True)]
    if len(opened) == 1:
        return opened[0]
    key = {"kind": "blend", "weights": normalized(weights), "num_samples": wanted}
    return Blend(opened, cached(job.cache, key, lambda: {"order": blend_order(weights, wanted)})["order"])


def _open_text(part: Part, job: Job, num_samples: int) -> Samples:
    """The samples of one part: at least `num_samples`, over as many epochs as that takes."""
    config = job.config
    data = GPTDataset(
        part.data, part.documents,
        sequence_length=config.sequence_length, num_samples=num_samples, seed=config.seed,
        cache=job.cache, fingerprint=part.source.fingerprint,
    )  # fmt: skip
    if not config.resets_at_eod or job.eod_id is None:
        return TextSamples(data)
    return TextSamples(
        data, job.eod_id,
        reset_position_ids=config.reset_position_ids, reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
    )  # fmt: skip
