"""Text to token ids: files of records to Megatron's .bin and .idx, with the tokenizer of the model.

Each set of the raw data becomes a dataset, each record one document, in the files' order, whatever the number of workers.
Documents without tokens are left out and counted. Lines that cannot be read are counted and listed in malformed.jsonl (file,
line, reason); above the share that settings.max_malformed allows, the stage fails and names the first ones. Stopped in the
middle, it goes on from the parts that are finished.
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
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import PreprocessSpec
from stages.examples import write_examples
from stages.runtime import BadInput, Context, Interrupted

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
    tokenizer = _tokenizer(spec, model_folder / "files", model.model.vocab_size, is_text=data.sets[0].format == "text")
    jobs = [
        Job(
            tuple(SourceFile(data_folder / name, name) for name in raw.files),
            _recipe(spec, raw, tokenizer, model_folder / "files"),
            ctx.scratch / raw.name,
        )
        for raw in data.sets
    ]
    encoder = _encoder(jobs[0].recipe)  # all sets have one tokenizer and one template
    size = sum(file.size for job in jobs for file in job.files)
    ctx.log(f"tokenizing {size / 1e6:,.1f} MB with {settings.workers} workers, {tokenizer.kind} tokenizer")
    try:
        counts = _tokenize(jobs, settings.workers, settings.max_malformed, ctx)
        if counts.seen.documents == 0:
            where = ", ".join(str(file.path) for job in jobs for file in job.files)
            raise BadInput(
                f"{where}: no document with text in {counts.seen.rows:,} lines ({counts.seen.empty:,} empty, "
                f"{counts.seen.malformed:,} malformed, {counts.seen.blank:,} blank). Check data.source, data.text_column and "
                "data.include"
            )
    except WorkerDied as error:
        raise Interrupted(
            f"{error}. If that was the kernel, for lack of memory, lower preprocess.workers (now {settings.workers}); "
            "then run again"
        ) from error
    except (BadInput, UnreadableFile) as error:
        # Nothing will go on from here: what mends it makes another result.
        for job in jobs:
            remove_parts(job)
        (ctx.scratch / MALFORMED_FILE).unlink(missing_ok=True)
        raise error if isinstance(error, BadInput) else BadInput(f"{data_folder}/{error}") from None
    write_examples(ctx.scratch, jobs, tokenizer)
    sets = tuple(_set(raw, join(job)) for raw, job in zip(data.sets, jobs, strict=True))
    for job in jobs:
        remove_parts(job)
        drop_plain_weights(job.prefix)
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
        content="text" if data.sets[0].format == "text" else "conversations",
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
    """How the records of a set are encoded."""
    settings = spec.settings
    if raw.format == "text":
        return TextRecipe(
            folder, tokenizer.kind, raw.text_column, settings.bos_eos, settings.reference_special_text, spec.added_tokens
        )
    return ConversationRecipe(
        folder,
        tokenizer.kind,
        raw.format,
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
            f"preprocess.bos_eos={settings.bos_eos}: the tokenizer names no end-of-text token. Name its eos_token in "
            "tokenizer_config.json, or set preprocess.bos_eos: none"
        )
    elif settings.bos_eos == "both" and tokenizer.bos_id is None:
        raise BadInput(
            "preprocess.bos_eos=both: the tokenizer names no begin-of-text token. Name its bos_token in tokenizer_config.json, "
            "or set preprocess.bos_eos: eos"
        )
    try:
        return load_tokenizer(folder, tokenizer.kind, added_tokens=spec.added_tokens) if spec.added_tokens else tokenizer
    except ValueError as error:
        raise BadInput(f"model.added_tokens: {error}") from error


@dataclass
class Counts:
    """What was seen so far, and how fast."""

    seen: Statistics = field(default_factory=Statistics)
    first_malformed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    new_tokens: int = 0  # not those of parts that were there from before
    new_documents: int = 0

    def add(self, progress: Progress) -> None:
        """Count a part."""
        statistics = progress.report.statistics
        self.seen.add(statistics)
        if progress.is_new:
            self.new_tokens += statistics.tokens
            self.new_documents += statistics.documents
        self.seconds = time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def speed(self) -> str:
        """Tokens and tokens per second, as a person reads them."""
        rate = f"{self.rate / 1e6:.1f} M" if self.rate >= 1e6 else f"{self.rate:,.0f}"
        return f"{self.seen.tokens:,} tokens · {rate} tokens/s"

    def documents_per_second(self) -> str:
        """Documents per second, as a person reads them."""
        return f"{self.new_documents / self.seconds if self.seconds else 0:,.0f} documents/s"

    def figure(self) -> str:
        """The stage in one line."""
        seen = self.seen
        malformed = f", {seen.malformed:,} malformed lines left out" if seen.malformed else ""
        left_out = "".join(f", {count:,} left out as {reason}" for reason, count in sorted(seen.left_out.items()))
        return f"{self.speed()} · {seen.documents + seen.empty:,} documents, {seen.empty:,} empty{malformed}{left_out}"


def _tokenize(jobs: list[Job], workers: int, max_malformed: float, ctx: Context) -> Counts:
    """Make the parts of all jobs in the scratch folder and, where lines are malformed, malformed.jsonl."""
    counts = Counts()
    refused = ctx.scratch / MALFORMED_FILE
    sizes = [sum(file.size for file in job.files) for job in jobs]
    total, before, at_start = max(1, sum(sizes)), 0, 0.0
    with refused.open("w") as record:
        for job, size in zip(jobs, sizes, strict=True):
            with closing(tokenize(job, workers)) as results:
                for progress in results:
                    counts.add(progress)
                    _record_malformed(progress, job, counts, record)
                    if counts.seen.malformed and max_malformed == 0:
                        raise _too_many(counts, max_malformed, so_far=progress.share < 1)  # no need to see the rest
                    share = (before + progress.share * size) / total
                    if not progress.is_new:
                        at_start = share
                    left = counts.seconds / max(share - at_start, 1e-9) * (1 - share)
                    ctx.progress(share, 1, f"{counts.speed()} · {counts.documents_per_second()} · {_duration(left)} left")
            before += size
    ctx.progress(1, 1, f"{counts.speed()} · {counts.documents_per_second()} · 0s left")
    if counts.seen.malformed > max_malformed * counts.seen.rows:
        raise _too_many(counts, max_malformed, so_far=False)
    if counts.seen.malformed:
        ctx.warn(f"{counts.seen.malformed:,} malformed lines left out, listed in {MALFORMED_FILE}; {counts.first_malformed[0]}")
    else:
        refused.unlink()
    return counts


def _record_malformed(progress: Progress, job: Job, counts: Counts, record: IO[str]) -> None:
    file = job.files[progress.report.file]
    for line, reason in progress.malformed:
        record.write(json.dumps({"file": file.name, "line": line, "reason": reason}, ensure_ascii=False) + "\n")
        if len(counts.first_malformed) < SHOWN:
            counts.first_malformed.append(f"{file.path}:{line}: {reason}")


def _too_many(counts: Counts, max_malformed: float, *, so_far: bool) -> BadInput:
    """The error that names the first malformed lines."""
    more = counts.seen.malformed - len(counts.first_malformed)
    lines = [*counts.first_malformed, *([f"and {more:,} more"] if more else [])]
    return BadInput(
        f"{counts.seen.malformed:,} of the {'first ' if so_far else ''}{counts.seen.rows:,} lines are malformed, "
        f"more than preprocess.max_malformed={max_malformed:g} allows:\n  " + "\n  ".join(lines) + "\n"
        "Mend them, or set preprocess.max_malformed to the share of lines that may be left out"
    )


def _duration(seconds: float) -> str:
    """Time as a person reads it: 12s, 3m 12s, 2h 05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


if __name__ == "__main__":
    runtime.main("preprocess", run, __doc__, resumable=True)
