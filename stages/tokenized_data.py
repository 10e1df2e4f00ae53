"""Data that was tokenized elsewhere, in Megatron's format: taken into the workspace, and checked instead of tokenized.

Its files stay byte for byte what they are, whoever wrote them.
"""

from pathlib import Path

from megatron_core_impl.data.checking import check_dataset, count_unended
from megatron_core_impl.data.inspection import statistics_of
from megatron_core_impl.data.statistics import Statistics
from megatron_core_impl.data.streams import find_streams
from megatron_core_impl.data.tokenizer import Tokenizer
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import tokenized, words
from stages.contracts.config import BosEos
from stages.contracts.data_settings import NamedSource
from stages.model_files import copy_file
from stages.outcomes import BadInput


def take(named: NamedSource, ctx: Context) -> a.RawSet:
    """The files of a source, under the names that they have in all results."""
    streams = tokenized.dataset_of(named)
    names, origins, done, total = [], [], 0, sum(file.stat().st_size for file in streams.files)
    for file in streams.files:
        name = named.name + file.name.removeprefix(streams.prefix.name)
        copy_file(file, ctx.scratch / name)
        names.append(name)
        origins.append(file.name)
        done += file.stat().st_size
        ctx.progress(done, total, f"{file.name}, {words.size(done)} of {words.size(total)}")
    return a.RawSet(
        name=named.name,
        key=named.key,
        role=named.role,
        files=tuple(names),
        origins=tuple(origins),
        format="tokenized",
        text_columns=named.settings.text_columns,
        columns={},
        source=streams.prefix.name,
        documents=None,
        text_bytes=total,
    )


def check(raw: a.RawSet, folder: Path, tokenizer: Tokenizer, bos_eos: BosEos, ctx: Context) -> Statistics:
    """Read a set from its beginning to its end.

    Raises:
        BadInput: a file is damaged, or its ids are not the tokenizer's.
    """
    try:
        streams = find_streams(folder / raw.name)
        dataset = check_dataset(
            streams,
            tokenizer.vocab_size,
            lambda done, total: ctx.progress(done, total, f"{done:,} of {total:,} tokens of {raw.source} checked"),
        )
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"the tokenized data {raw.source}: {error}") from None
    seen = statistics_of(dataset)
    if not seen.tokens:
        raise BadInput(f"the tokenized data {raw.source}: there is no token in it")
    end = tokenizer.eod_id if raw.content == "text" and bos_eos != "none" else None
    if end is not None and (unended := count_unended(dataset, end)):
        ctx.warn(
            f"{unended:,} of {seen.documents:,} documents of {raw.source} do not end with the end-of-text token {end}, though "
            f"preprocess.bos_eos is {bos_eos}: what looks for the end of documents misses theirs"
        )
    return seen


def put(raw: a.RawSet, folder: Path, ctx: Context) -> None:
    """Add the files of a set to the result. Results are not written to, so those of two stages may share a file."""
    for name in raw.files:
        (ctx.scratch / name).unlink(missing_ok=True)
        try:
            (ctx.scratch / name).hardlink_to(folder / name)
        except OSError:  # another file system, or one without links
            copy_file(folder / name, ctx.scratch / name)
