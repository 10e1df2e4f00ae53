"""Text to token ids: data.jsonl to Megatron's data.bin and data.idx, with the tokenizer of the model.

Each line `{"text": …}` becomes one document, in the file's order, whatever the number of workers. Documents without tokens
are left out and counted. Lines that cannot be read are counted and listed in malformed.jsonl (file, line, reason); above the
share that settings.max_malformed allows, the stage fails and names the first ones.
"""

import json
import time
from contextlib import closing
from dataclasses import dataclass, field

from megatron_core_impl.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from megatron_core_impl.data.tokenization import Chunk, Job, WorkerDied, tokenize_file
from megatron_core_impl.data.tokenizer import Tokenizer, load_tokenizer
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import PreprocessSpec
from stages.runtime import BadInput, Context, Interrupted

RAW_FILE = "data.jsonl"
MALFORMED_FILE = "malformed.jsonl"
SHOWN = 5  # malformed lines that an error names


def run(spec: PreprocessSpec, ctx: Context) -> a.DatasetArtifact:
    """Tokenize the text.

    Raises:
        BadInput: the tokenizer is missing or does not fit the model, too many lines are malformed, or there is no text.
        Interrupted: a worker was killed.
    """
    settings = spec.settings
    data, data_folder = ctx.input("data", a.RawDataArtifact)
    model, model_folder = ctx.input("model", a.ModelArtifact)
    try:
        tokenizer = load_tokenizer(model_folder / "files", settings.tokenizer)
    except ValueError as error:
        raise BadInput(f"preprocess.tokenizer={settings.tokenizer}: {error}") from error
    _check_fit(tokenizer, model.model.vocab_size, settings.append_eod)
    dtype = dtype_for(tokenizer.vocab_size)
    job = Job(data_folder / RAW_FILE, model_folder / "files", tokenizer.kind, settings.append_eod, dtype)
    ctx.log(f"tokenizing {data.text_bytes / 1e6:,.1f} MB with {settings.workers} workers, {tokenizer.kind} tokenizer")
    try:
        counts = _tokenize(job, settings.workers, settings.max_malformed, ctx)
    except WorkerDied as error:
        raise Interrupted(
            f"{error}. If that was the kernel, for lack of memory, lower preprocess.workers (now {settings.workers}); "
            "then run again"
        ) from error
    if counts.documents == 0:
        raise BadInput(
            f"{job.file}: no document with text in {counts.lines:,} lines ({counts.empty:,} empty, "
            f"{counts.malformed:,} malformed). Check data.source, data.text_column and data.include"
        )
    return ctx.artifact(
        a.DatasetArtifact,
        figure=counts.figure(),
        metrics={
            "tokens_per_second": round(counts.rate),
            "tokens_per_document": round(counts.tokens / counts.documents, 1),
            "longest_document": counts.longest,
        },
        tokenizer=a.TokenizerFacts(
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            bos_id=tokenizer.bos_id,
            fingerprint=tokenizer.fingerprint,
        ),
        dtype=dtype.name,
        documents=counts.documents,
        empty_documents=counts.empty,
        malformed_lines=counts.malformed,
        tokens=counts.tokens,
        append_eod=settings.append_eod,
    )


def _check_fit(tokenizer: Tokenizer, model_vocab_size: int, append_eod: bool) -> None:
    """Refuse a tokenizer whose ids the model has no rows for, or that has no token to end documents with."""
    if tokenizer.vocab_size > model_vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's config.json has vocab_size={model_vocab_size:,}: "
            f"ids from {model_vocab_size:,} on would have no embedding. Take the tokenizer that belongs to the model, "
            "or the other one of its folder (preprocess.tokenizer)"
        )
    if append_eod and tokenizer.eod_id is None:
        raise BadInput(
            "preprocess.append_eod: the tokenizer names no end-of-text token. Name its eos_token in tokenizer_config.json, "
            "or set preprocess.append_eod: false"
        )


@dataclass
class Counts:
    """What was seen so far."""

    lines: int = 0
    documents: int = 0  # written: with tokens
    empty: int = 0
    tokens: int = 0
    longest: int = 0
    malformed: int = 0
    first_malformed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, chunk: Chunk) -> None:
        """Count a chunk."""
        self.lines += chunk.lines
        self.documents += len(chunk.sizes)
        self.empty += chunk.empty
        self.tokens += len(chunk.tokens)
        self.longest = max(self.longest, int(chunk.sizes.max(initial=0)))
        self.malformed += len(chunk.malformed)
        self.seconds = time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def speed(self) -> str:
        """Tokens and tokens per second, as a person reads them."""
        rate = f"{self.rate / 1e6:.1f} M" if self.rate >= 1e6 else f"{self.rate:,.0f}"
        return f"{self.tokens:,} tokens · {rate} tokens/s"

    def figure(self) -> str:
        """The stage in one line."""
        malformed = f", {self.malformed:,} malformed lines left out" if self.malformed else ""
        return f"{self.speed()} · {self.documents + self.empty:,} documents, {self.empty:,} empty{malformed}"


def _tokenize(job: Job, workers: int, max_malformed: float, ctx: Context) -> Counts:
    """Write data.bin, data.idx and, where lines are malformed, malformed.jsonl into the scratch folder."""
    counts = Counts()
    refused = ctx.scratch / MALFORMED_FILE
    chunks = max(1, job.num_chunks)
    with (
        IndexedDatasetWriter(ctx.scratch / "data", job.dtype) as writer,
        refused.open("w") as record,
        closing(tokenize_file(job, workers)) as results,
    ):
        for chunk in results:
            writer.add_documents(chunk.tokens, chunk.sizes)
            for line, reason in chunk.malformed:
                number = counts.lines + line
                record.write(json.dumps({"file": RAW_FILE, "line": number, "reason": reason}, ensure_ascii=False) + "\n")
                if len(counts.first_malformed) < SHOWN:
                    counts.first_malformed.append(f"{job.file}:{number}: {reason}")
            counts.add(chunk)
            if counts.malformed and max_malformed == 0:
                raise _too_many(counts, max_malformed, so_far=chunk.number + 1 < chunks)  # no need to see the rest
            done = chunk.number + 1
            left = counts.seconds / done * (chunks - done)
            ctx.progress(done, chunks, f"{counts.speed()} · {_duration(left)} left")
    if counts.malformed > max_malformed * counts.lines:
        raise _too_many(counts, max_malformed, so_far=False)
    if counts.malformed:
        ctx.warn(f"{counts.malformed:,} malformed lines left out, listed in {MALFORMED_FILE}; {counts.first_malformed[0]}")
    else:
        refused.unlink()
    return counts


def _too_many(counts: Counts, max_malformed: float, *, so_far: bool) -> BadInput:
    """The error that names the first malformed lines."""
    more = counts.malformed - len(counts.first_malformed)
    lines = [*counts.first_malformed, *([f"and {more:,} more"] if more else [])]
    return BadInput(
        f"{counts.malformed:,} of the {'first ' if so_far else ''}{counts.lines:,} lines are malformed, "
        f"more than preprocess.max_malformed={max_malformed:g} allows:\n  " + "\n  ".join(lines) + "\n"
        "Mend them, or set preprocess.max_malformed to the share of lines that may be left out"
    )


def _duration(seconds: float) -> str:
    """Time as a person reads it: 12s, 3m 12s, 2h 05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


if __name__ == "__main__":
    runtime.main("preprocess", run, __doc__)
