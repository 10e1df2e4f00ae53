"""From the datasets of a job to the samples of its training, of its evaluations, and of the test at the end.

A role (train, valid, test) takes from each dataset of role `all` its share of the documents, by `config.split`, and all of each
dataset that is named for the role. Where these are several, they are blended by their weights. Evaluations read no sample twice
and stay within their budget, so a small split is read once, not over and over.

What takes time here, the indices of samples, goes to the job's cache. `prepare` fills it; a worker calls it before it joins a
process group, where the others would wait for it and give up. No torch in here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from megatron_core_impl.data.blend import Blend, blend_order, normalized, samples_of_each
from megatron_core_impl.data.gpt_dataset import GPTDataset, TextSamples, samples_of_tokens
from megatron_core_impl.data.index_cache import cached
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.samples import Samples
from megatron_core_impl.data.splits import split_documents
from megatron_core_impl.train_config import DataSet, Job
from megatron_core_impl.training_conversations import ROLES, Role, conversation_part, open_conversations, told


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
    """The tokens that training takes from all datasets before one is repeated; of conversations with the padding of samples."""
    if job.content == "text":
        return sum(part.tokens for part in parts_of(job.sets, job.config.split, "train"))
    samples = sum(offer.per_epoch for offer in _offers(job, "train", lambda line: None))
    return samples * job.config.sequence_length + 1  # as of text: the last label is no input


def open_data(job: Job, log: Callable[[str], None] = lambda line: None) -> TrainingData:
    """The samples of a job, its indices from the cache where they are there.

    Args:
        log: told about datasets that give a role nothing.

    Raises:
        ValueError: there is nothing to train on, or nothing to measure the held-out loss on.
    """
    train, valid = _samples(job, "train", log), _samples(job, "valid", log)
    for role, samples in (("train", train), ("valid", valid)):
        if samples is None:
            raise ValueError(_nothing(job, role))
    assert train is not None
    assert valid is not None
    return TrainingData(train, valid, _samples(job, "test", log))


def _nothing(job: Job, role: str) -> str:
    """Why a role has no samples, and what would give it some."""
    config = job.config
    lacks, shorter = f"the {config.sequence_length + 1:,} tokens of one sample", ""
    if job.content == "conversations":
        lacks = "a conversation"
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


def _offers(job: Job, role: Role, log: Callable[[str], None]) -> list[_Offer]:
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
            part = conversation_part(source, job, role)
            log(told(part))
            held = f"{len(part.chosen):,} conversations"
            offers.append(_Offer(source, part.samples_per_epoch, held, partial(open_conversations, part)))
    return offers


def _samples(job: Job, role: Role, log: Callable[[str], None]) -> Samples | None:
    """The samples of a role; None where no dataset has one."""
    found = _offers(job, role, log)
    offers = [offer for offer in found if offer.per_epoch]
    if not offers:
        return None
    for offer in found:
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
