"""Bring text, or conversations, into the workspace, from this disk or from the Hub: a set of files for each source.

Files of records (`DATA_FILES`) are copied as they are, and preprocess reads them. Everything else becomes one `.jsonl` file: of
source files, each a document; of the rows of a dataset of the Hub, or of one that `datasets` saved to disk.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stages import hub_rows
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.data_settings import NamedSource
from stages.contracts.sources import expand
from stages.contracts.specs import DownloadDataSpec
from stages.local_source import local_name, local_source
from stages.model_files import copy_file, listed
from stages.runtime import BadInput, Context
from stages.text_sources import Line, SourceFiles

DATA_FILES = (
    ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst", ".parquet",
)  # fmt: skip


def collect(spec: DownloadDataSpec, ctx: Context) -> a.RawDataArtifact:
    """The data of every source.

    Raises:
        BadInput: a source does not exist, may not be read, or is empty; the message says what to do.
    """
    counts = Counter[str]()  # of files that were left out, by reason
    sets = [_collect(named, spec, ctx, counts) for named in spec.data.sources()]
    files, size = sum(len(each.files) for each in sets), sum(each.text_bytes for each in sets)
    known = [each.documents for each in sets if each.documents is not None]
    documents = sum(known) if len(known) == len(sets) else None
    what = f"{documents:,} documents" if documents is not None else f"{files:,} file{'s' if files > 1 else ''}"
    parts = [f"{len(sets)} sources" if len(sets) > 1 else "", what, f"{words.size(size)} of text"]
    note = f" (left out: {', '.join(f'{count:,} {why}' for why, count in counts.items() if count)})" if counts.total() else ""
    return ctx.artifact(
        a.RawDataArtifact,
        figure=", ".join(filter(None, parts)) + note,
        metrics=dict(counts),
        documents=documents,
        source=" + ".join(each.source for each in sets if each.role in ("all", "train")),
        revision=sets[0].revision if len(sets) == 1 else None,
        text_bytes=size,
        sets=tuple(sets),
    )


def _collect(named: NamedSource, spec: DownloadDataSpec, ctx: Context, counts: Counter[str]) -> a.RawSet:
    source, key = named.settings, named.key
    path = local_source(source.source, f"{key}.source")
    if path is None:
        cache = ctx.workspace / ".cache" / "datasets"
        revision, lines = hub_rows.of_hub(source, key, cache, ctx.progress)
        return _written(named, lines, ctx, revision=revision)
    if path.is_dir() and hub_rows.is_saved(path):
        return _written(named, hub_rows.of_disk(source, key, path, ctx.progress), ctx)
    if path.is_dir():
        return _of_folder(named, path, ctx, counts)
    root, files = (path.parent, [path]) if path.is_file() else expand(source.source)
    if not files:
        held = listed({inner.name for inner in root.iterdir()}) if root.is_dir() else "nothing, as it does not exist"
        raise BadInput(f"{key}.source: no file matches {source.source}; {root} holds: {held}")
    for file in files:
        if not file.name.endswith(DATA_FILES):
            raise BadInput(f"{key}.source: {file} is no file of records, one JSON object per line: {', '.join(DATA_FILES)}")
    return _copied(named, root, files, ctx)


def _of_folder(named: NamedSource, folder: Path, ctx: Context, counts: Counter[str]) -> a.RawSet:
    """Files of records, where all that match are; else each file is a document."""
    source = named.settings
    text = SourceFiles(
        folder.resolve(), source.include, source.exclude, ctx.progress, ctx.workspace.resolve(), setting=f"{named.key}.include"
    )
    paths = text.paths()
    others = [path for path in paths if not path.endswith(DATA_FILES)]
    if not others:
        return _copied(named, text.folder, [text.folder / path for path in paths], ctx)
    if source.content == "conversations":
        raise BadInput(
            f"{named.key}.include: {others[0]} of {folder} is no file of records. Narrow include to those: "
            + ", ".join(DATA_FILES)
        )
    if len(others) < len(paths):
        ctx.log(f"{len(paths) - len(others):,} of {len(paths):,} files hold records, but are taken as text, like the others")
    made = _written(named, text.lines(), ctx)
    counts.update({why: count for why, count in text.counts.items() if why != "documents"})
    return made


def _copied(named: NamedSource, root: Path, files: list[Path], ctx: Context) -> a.RawSet:
    """Files of records, as they are."""
    names, total, done = [], sum(file.stat().st_size for file in files), 0
    if not total:
        raise BadInput(f"{named.key}.source: {named.settings.source} is empty")
    for number, file in enumerate(files, start=1):
        name = f"{named.name}/{file.relative_to(root).as_posix()}"
        (ctx.scratch / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, ctx.scratch / name)
        names.append(name)
        done += file.stat().st_size
        ctx.progress(done, total, f"{number:,} of {len(files):,} files, {words.size(done)} of {words.size(total)}")
    return _set(named, tuple(names), documents=None, text_bytes=total)


def _written(named: NamedSource, lines: Iterator[Line], ctx: Context, revision: str | None = None) -> a.RawSet:
    """Documents as lines of one file."""
    documents = text_bytes = 0
    name = f"{named.name}.jsonl"
    with (ctx.scratch / name).open("wb") as file:
        for line, size in lines:
            file.write(line)
            documents += 1
            text_bytes += size
    return _set(named, (name,), documents=documents, text_bytes=text_bytes, revision=revision, is_normal=True)


def _set(
    named: NamedSource, files: tuple[str, ...], *, documents: int | None, text_bytes: int, revision: str | None = None,
    is_normal: bool = False,
) -> a.RawSet:  # fmt: skip
    """`is_normal`: text lies under the key "text", whatever it is called in the source."""
    source = named.settings
    path = Path(source.source).expanduser()
    return a.RawSet(
        name=named.name,
        role=named.role,
        files=files,
        format=source.format,
        text_column="text" if is_normal else source.text_column,
        columns=source.columns,
        source=source.source if not path.exists() and "*" not in source.source else local_name(path),
        revision=revision,
        documents=documents,
        text_bytes=text_bytes,
    )
