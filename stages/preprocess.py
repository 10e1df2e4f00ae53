"""Text to token ids: files of records to Megatron's .bin and .idx, with the tokenizer of the model.

Each set of the raw data becomes a dataset, each record one document, in the files' order, whatever the number of workers.
Documents without tokens are left out and counted. Lines that cannot be read are counted and listed in malformed.jsonl (source,
file, line, reason); above the share of a set's lines that settings.max_malformed allows, the stage fails, names the first ones,
and leaves the list beside its results. Stopped in the middle, it goes on from the parts that are finished. Data that came
tokenized are checked, and taken as they are.
"""

import json
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_core_impl.data.conversation_encoder import ConversationEncoder, ConversationRecipe, drop_plain_weights
from megatron_core_impl.data.encoder import Encoder, Recipe
from megatron_core_impl.data.indexed_dataset import dtype_for
from megatron_core_impl.data.preprocessing import Job, Progress, WorkerDied, join, remove_parts, tokenize
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.text_encoder import TextRecipe
from megatron_core_impl.data.text_files import SourceFile, UnreadableFile
from megatron_core_impl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_core_impl.metrics import duration
from stages import runtime, tokenized_data
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import PreprocessSpec
from stages.examples import write_examples
from stages.outcomes import BadInput, Interrupted

MALFORMED_FILE = "malformed.jsonl"
WITH_WEIGHTS = ("messages", "sharegpt")  # formats whose messages may have weights
SHOWN = 5  # malformed lines that an error names


def run(spec: PreprocessSpec, ctx: Context) -> a.DatasetArtifact:
    """Tokenize the text.

    Raises:
        BadInput: the tokenizer is missing or does not fit the model, a file cannot be read, too many lines are malformed, or
            there is no text.
        Interrupted: a worker was killed.
    """
    settings = spec.settings
    data, data_folder = ctx.input("data", a.RawDataArtifact)
    model, model_folder = ctx.input("model", a.ModelArtifact)
    tokenizer = _tokenizer(spec, model_folder / "files", model.model.vocab_size, is_text=data.sets[0].content == "text")
    recipes = {raw.name: _recipe(spec, raw, tokenizer, model_folder / "files") for raw in data.sets}
    jobs = {
        raw.name: Job(
            tuple(SourceFile(data_folder / name, origin) for name, origin in zip(raw.files, raw.origins, strict=True)),
            recipes[raw.name],
            ctx.scratch / raw.name,
        )
        for raw in data.sets
        if raw.format != "tokenized"
    }
    encoder = _encoder(recipes[data.sets[0].name])  # all sets have one tokenizer and one template
    tokenized = [raw for raw in data.sets if raw.name not in jobs]
    seen_in = {raw.name: tokenized_data.check(raw, data_folder, tokenizer, settings.bos_eos, ctx) for raw in tokenized}
    if jobs:
        size = sum(file.size for job in jobs.values() for file in job.files)
        ctx.log(f"tokenizing {size / 1e6:,.1f} MB with {settings.workers} workers, {tokenizer.kind} tokenizer")
    try:
        to_do = [(raw, jobs[raw.name]) for raw in data.sets if raw.name in jobs]
        counts = _tokenize(to_do, settings.workers, settings.max_malformed, ctx) if to_do else Counts()
    except WorkerDied as error:
        raise Interrupted(
            f"{error}. If that was the kernel, for lack of memory, lower preprocess.workers (now {settings.workers}); "
            "then run again"
        ) from error
    except BadInput:
        # Nothing will go on from here: what mends it makes another result.
        for job in jobs.values():
            remove_parts(job)
        (ctx.scratch / MALFORMED_FILE).unlink(missing_ok=True)
        raise
    write_examples(ctx.scratch, recipes[data.sets[0].name], list(jobs.values()), tokenizer)
    for statistics in seen_in.values():
        counts.seen.add(statistics)
    seen_in |= {name: join(job) for name, job in jobs.items()}
    sets = tuple(_set(raw, seen_in[raw.name]) for raw in data.sets)
    for job in jobs.values():
        remove_parts(job)
        drop_plain_weights(job.prefix)
    for raw in tokenized:
        tokenized_data.put(raw, data_folder, ctx)
    seen = counts.seen
    return ctx.artifact(
        a.DatasetArtifact,
        figure=counts.figure(),
        metrics={
            "tokens_per_second": round(counts.rate),
            "tokens_per_document": round(seen.tokens / seen.documents, 1),
            "longest_document": seen.longest,
        },
        tokenizer=a.TokenizerFacts(
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            bos_id=tokenizer.bos_id,
            fingerprint=tokenizer.fingerprint,
            added_tokens=tokenizer.added_tokens,
        ),
        content=data.sets[0].content,
        header_tokens=encoder.header_tokens if isinstance(encoder, ConversationEncoder) else 0,
        end_of_answer=encoder.end_of_answer if isinstance(encoder, ConversationEncoder) else None,
        sets=sets,
        dtype=dtype_for(tokenizer.vocab_size).name,
        documents=seen.documents,
        empty_documents=seen.empty,
        malformed_lines=seen.malformed,
        tokens=seen.tokens,
        bos_eos=settings.bos_eos,
    )


def _recipe(spec: PreprocessSpec, raw: a.RawSet, tokenizer: Tokenizer, folder: Path) -> Recipe:
    """How the records of a set are encoded, or were, where it came tokenized."""
    settings = spec.settings
    if raw.content == "text":
        return TextRecipe(
            folder, tokenizer.kind, raw.text_columns, settings.bos_eos, settings.reference_special_text, spec.added_tokens
        )
    return ConversationRecipe(
        folder,
        tokenizer.kind,
        "messages" if raw.format == "text" or raw.format == "tokenized" else raw.format,  # no record of these is read
        settings.chat_template,
        columns=tuple(sorted(raw.columns.items())),
        added_tokens=spec.added_tokens,
        has_weights=raw.format in WITH_WEIGHTS,
        parse_special=settings.reference_special_text,
    )


def _encoder(recipe: Recipe) -> Encoder:
    """The encoder of a recipe, as the workers make it. That tells, too, whether a chat template and its tokens are there.

    Raises:
        BadInput: they are not.
    """
    try:
        return recipe.encoder()
    except ValueError as error:
        raise BadInput(f"preprocess.chat_template: {error}") from error


def _set(raw: a.RawSet, seen: Statistics) -> a.DatasetSet:
    return a.DatasetSet(
        name=raw.name,
        role=raw.role,
        documents=seen.documents,
        tokens=seen.tokens,
        empty_documents=seen.empty,
        malformed_lines=seen.malformed,
        blank_lines=seen.blank,
        longest=seen.longest,
        lengths=seen.histogram(),
        left_out=dict(sorted(seen.left_out.items())),
    )


def _tokenizer(spec: PreprocessSpec, folder: Path, model_vocab_size: int, *, is_text: bool) -> Tokenizer:
    """The tokenizer of the model, with the added tokens.

    Raises:
        BadInput: there is none, the model has no rows for its ids, or it lacks the token that begins or ends documents.
    """
    settings = spec.settings
    try:
        tokenizer = load_tokenizer(folder, settings.tokenizer)
    except ValueError as error:
        raise BadInput(f"preprocess.tokenizer={settings.tokenizer}: {error}") from error
    if tokenizer.vocab_size > model_vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's config.json has vocab_size={model_vocab_size:,}: "
            f"ids from {model_vocab_size:,} on would have no embedding. Take the tokenizer that belongs to the model, "
            "or the other one of its folder (preprocess.tokenizer)"
        )
    if not is_text:
        pass  # a chat template says what begins and ends a conversation
    elif settings.bos_eos != "none" and tokenizer.eod_id is None:
        raise BadInput(
            f"preprocess.bos_eos={settings.bos_eos}: the tokenizer names no end-of-text token. "
            f"{_advice(tokenizer, folder, 'eos_token')}set preprocess.bos_eos: none"
        )
    elif settings.bos_eos == "both" and tokenizer.bos_id is None:
        raise BadInput(
            "preprocess.bos_eos=both: the tokenizer names no begin-of-text token. "
            f"{_advice(tokenizer, folder, 'bos_token')}set preprocess.bos_eos: eos"
        )
    try:
        return load_tokenizer(folder, tokenizer.kind, added_tokens=spec.added_tokens) if spec.added_tokens else tokenizer
    except ValueError as error:
        raise BadInput(f"model.added_tokens: {error}") from error


def _advice(tokenizer: Tokenizer, folder: Path, name: str) -> str:
    """How a tokenizer gets a token that it does not name, as the beginning of a sentence; empty where it cannot."""
    if tokenizer.kind == "huggingface":
        return f"Name its {name} in tokenizer_config.json, or "
    return "Set preprocess.tokenizer: huggingface, if that names one, or " if (folder / "tokenizer.json").is_file() else ""


@dataclass
class SetCounts:
    """What was seen of a set so far."""

    key: str  # of its source in the configuration
    source: str
    seen: Statistics = field(default_factory=Statistics)
    first_malformed: list[str] = field(default_factory=list)


@dataclass
class Counts:
    """What was seen of all sets so far, and how fast."""

    sets: list[SetCounts] = field(default_factory=list)
    seen: Statistics = field(default_factory=Statistics)
    share: float = 0.0  # of all files
    new_share: float = 0.0  # without parts that were there from before
    new_tokens: int = 0
    new_documents: int = 0
    seconds: float = 0.0  # that the new ones took
    _at: float = field(default_factory=time.monotonic)

    def add(self, progress: Progress, share: float) -> None:
        """Count a part of the last set, up to which `share` of all files are finished."""
        statistics, took = progress.report.statistics, self.pause()
        self.seen.add(statistics)
        self.sets[-1].seen.add(statistics)
        if progress.is_new:
            self.new_tokens += statistics.tokens
            self.new_documents += statistics.documents
            self.new_share += share - self.share
            self.seconds += took
        self.share = share

    def pause(self) -> float:
        """Seconds since the last call; what passed is no time of the next part."""
        before, self._at = self._at, time.monotonic()
        return self._at - before

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def left(self) -> str:
        """The time that is left, as a person reads it; nothing while nothing was measured."""
        return f" · {duration(self.seconds / self.new_share * (1 - self.share))} left" if self.new_share else ""

    def speed(self) -> str:
        """Tokens and tokens per second, as a person reads them."""
        rate = f"{self.rate / 1e6:.1f} M" if self.rate >= 1e6 else f"{self.rate:,.0f}"
        return f"{self.seen.tokens:,} tokens" + (f" · {rate} tokens/s" if self.new_tokens else "")

    def documents_per_second(self) -> str:
        """Documents per second, as a person reads them."""
        return f"{self.new_documents / self.seconds if self.seconds else 0:,.0f} documents/s"

    def figure(self) -> str:
        """The stage in one line."""
        seen = self.seen
        malformed = f", {seen.malformed:,} malformed lines left out" if seen.malformed else ""
        blank = f", {seen.blank:,} blank lines" if seen.blank else ""
        left_out = "".join(f", {count:,} left out as {reason}" for reason, count in sorted(seen.left_out.items()))
        return f"{self.speed()} · {seen.documents + seen.empty:,} documents, {seen.empty:,} empty{blank}{malformed}{left_out}"


def _tokenize(sets: list[tuple[a.RawSet, Job]], workers: int, max_malformed: float, ctx: Context) -> Counts:
    """Make the parts of all jobs in the scratch folder and, where lines are malformed, malformed.jsonl.

    Raises:
        BadInput: a set has too many malformed lines, no document, or a file that cannot be read.
    """
    counts = Counts()
    listing = ctx.scratch / MALFORMED_FILE
    sizes = [sum(file.size for file in job.files) for _, job in sets]
    total, before = max(1, sum(sizes)), 0
    told = f"{counts.speed()} · {counts.documents_per_second()}"

    def checked(done: int, parts: int) -> None:
        counts.pause()
        ctx.progress(counts.share, 1, f"{counts.seen.tokens:,} tokens · checking {done:,} of {parts:,} finished parts")

    with listing.open("w") as record:
        for (raw, job), size in zip(sets, sizes, strict=True):
            current = SetCounts(raw.key, raw.source)
            counts.sets.append(current)
            with closing(tokenize(job, workers, checked)) as results:
                try:
                    for progress in results:
                        counts.add(progress, (before + progress.share * size) / total)
                        _record_malformed(progress, job, current, record)
                        if current.seen.malformed and max_malformed == 0:  # no need to see the rest
                            is_all = next(results, None) is None
                            record.flush()
                            raise _too_many(current, max_malformed, ctx, so_far=not is_all)
                        told = f"{counts.speed()} · {counts.documents_per_second()}"
                        ctx.progress(counts.share, 1, f"{told}{counts.left()}")
                except UnreadableFile as error:
                    raise BadInput(f"{raw.key}.source: {error}") from None
            before += size
    ctx.progress(1, 1, f"{told} · 0s left")
    for current in counts.sets:
        if current.seen.malformed > max_malformed * current.seen.rows:
            raise _too_many(current, max_malformed, ctx)
        if current.seen.documents == 0:
            raise _no_text(current, ctx)
    _kept_listing(ctx).unlink(missing_ok=True)
    if counts.seen.malformed:
        first = next(f"{current.key}: {line}" for current in counts.sets for line in current.first_malformed)
        ctx.warn(f"{counts.seen.malformed:,} malformed lines left out, listed in {MALFORMED_FILE}; {first}")
    else:
        listing.unlink()
    return counts


def _record_malformed(progress: Progress, job: Job, current: SetCounts, record: IO[str]) -> None:
    file = job.files[progress.report.file].name
    for line, reason in progress.malformed:
        values = {"source": current.key, "file": file, "line": line, "reason": reason}
        record.write(json.dumps(values, ensure_ascii=False) + "\n")
        if len(current.first_malformed) < SHOWN:
            current.first_malformed.append(f"{file}:{line}: {reason}")


def _kept_listing(ctx: Context) -> Path:
    """Where the list of malformed lines goes when the stage fails: the scratch folder does not survive that."""
    return ctx.scratch.parent / f".{ctx.spec.key}.{MALFORMED_FILE}"


def _first_lines(current: SetCounts, ctx: Context) -> str:
    """The first malformed lines of a set, and where all are listed."""
    (ctx.scratch / MALFORMED_FILE).replace(_kept_listing(ctx))
    more = current.seen.malformed - len(current.first_malformed)
    lines = [*current.first_malformed, *([f"and {more:,} more"] if more else [])]
    return "".join(f"\n  {line}" for line in lines) + f"\nAll are listed in {_kept_listing(ctx)}. "


def _too_many(current: SetCounts, max_malformed: float, ctx: Context, *, so_far: bool = False) -> BadInput:
    """The error that names the first malformed lines."""
    return BadInput(
        f"{current.key}.source: {current.seen.malformed:,} of the {'first ' if so_far else ''}{current.seen.rows:,} lines of "
        f"{current.source} are malformed, more than preprocess.max_malformed={max_malformed:g} allows:"
        f"{_first_lines(current, ctx)}Mend them, or set preprocess.max_malformed to the share of lines that may be left out"
    )


def _no_text(current: SetCounts, ctx: Context) -> BadInput:
    seen = current.seen
    return BadInput(
        f"{current.key}.source: no document with text in {seen.rows:,} lines of {current.source} ({seen.empty:,} empty, "
        f"{seen.malformed:,} malformed, {seen.blank:,} blank){_first_lines(current, ctx) if seen.malformed else '. '}"
        f"Check {current.key}.source, {current.key}.text_column and {current.key}.include"
    )


if __name__ == "__main__":
    runtime.main("preprocess", run, __doc__, resumable=True)
