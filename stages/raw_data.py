"""Bring text, or conversations, into the workspace, from this disk or from the Hub: a set of files for each source.

Files of records (`text_files.SUFFIXES`) are copied as they are, and preprocess reads them. Everything else becomes one `.jsonl`
file: of source files, each a document; of the rows of a dataset of the Hub, or of one that `datasets` saved to disk.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_core_impl.data.streams import bin_path
from megatron_core_impl.data.text_files import SUFFIXES
from stages import hub_rows
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import tokenized, words
from stages.contracts.data_settings import NamedSource
from stages.contracts.sources import expand, is_glob
from stages.contracts.specs import DownloadDataSpec
from stages.local_source import local_name, local_source
from stages.model_files import copy_file, listed
from stages.outcomes import BadInput
from stages.text_sources import Line, SourceFiles, check_links
from stages.tokenized_data import take

# What often lies beside files of records; so do names that begin with _ or a dot.
BESIDE = re.compile(
    r"(README|LICEN[SC]E|NOTICE|COPYING|CITATION|CHANGELOG|(MD5|SHA\d+)SUMS).*|dataset_infos?\.json|.*\.(md5|sha1|sha256|crc)",
    re.IGNORECASE,
)


def collect(spec: DownloadDataSpec, ctx: Context) -> a.RawDataArtifact:
    """The data of every source.

    Raises:
        BadInput: a source does not exist, may not be read, or is empty; the message says what to do.
    """
    if problems := tokenized.problems(spec.data):
        raise BadInput("\n  ".join(problems))
    counts = Counter[str]()  # of files that were left out, by reason
    sets = [_collect(named, spec, ctx, counts) for named in spec.data.sources()]
    files, size = sum(len(each.files) for each in sets), sum(each.text_bytes for each in sets)
    known = [each.documents for each in sets if each.documents is not None]
    documents = sum(known) if len(known) == len(sets) else None
    what = f"{documents:,} documents" if documents is not None else f"{files:,} file{'s' if files > 1 else ''}"
    parts = [f"{len(sets)} sources" if len(sets) > 1 else "", what, f"{words.size(size)} of {a.units(sets)}"]
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
    if source.format == "tokenized":
        return take(named, ctx)
    path = local_source(source.source, f"{key}.source")
    if path is None:
        cache = ctx.workspace / ".cache" / "datasets"
        revision, lines = hub_rows.of_hub(source, key, cache, ctx.progress)
        return _written(named, lines, ctx, f"{source.source} ({source.split})", source.text_columns, revision)
    if path.is_dir() and hub_rows.is_saved(path):
        lines = hub_rows.of_disk(source, key, path, ctx.progress)
        return _written(named, lines, ctx, f"{local_name(path)} ({source.split})", source.text_columns)
    if path.is_dir():
        return _of_folder(named, path, ctx, counts)
    root, files = (path.parent, [path]) if path.is_file() else expand(source.source)
    if not files:
        held = listed({inner.name for inner in root.iterdir()}) if root.is_dir() else "nothing, as it does not exist"
        raise BadInput(f"{key}.source: no file matches {source.source}; {root} holds: {held}")
    check_links(files, f"{key}.source")
    names = [file.relative_to(root).as_posix() for file in files]
    records, others = _sorted_out(names)
    if others or not records:
        raise BadInput(f"{key}.source: {root / (others or names)[0]} is no file of records. Those are: {', '.join(SUFFIXES)}")
    return _copied(
        named, root, records, ctx, "" if path.is_file() else f"{local_name(root)}/", _left_out(names, records, counts)
    )


def _of_folder(named: NamedSource, folder: Path, ctx: Context, counts: Counter[str]) -> a.RawSet:
    """Its files of records, if it has some; else each file is a document."""
    source, include = named.settings, f"{named.key}.include"
    text = SourceFiles(folder.resolve(), source.include, source.exclude, ctx.progress, ctx.workspace.resolve(), setting=include)
    paths = text.paths()
    _refuse_results(paths, folder, include)
    records, others = _sorted_out(paths)
    is_text = source.content == "text" and all(path.endswith(".json") for path in records)  # a program's settings, say
    if others and not is_text:
        if not records:
            raise BadInput(f"{include}: {others[0]} of {folder} is no file of records. Those are: {', '.join(SUFFIXES)}")
        mine, other = (Path(path).name for path in (records[0], others[0]))
        raise BadInput(
            f"{include}: {folder} holds {len(records):,} files of records, say {records[0]}, and {len(others):,} others, say "
            f'{others[0]}. Name what to read, e.g. {include}: ["**/*{Path(mine).suffix}"], or what to leave out, e.g. '
            f'{named.key}.exclude: ["**/{"*" + Path(other).suffix if Path(other).suffix else other}"]'
        )
    counts["links to folders"] += text.counts["links to folders"]
    if records and not others:
        return _copied(named, text.folder, records, ctx, f"{local_name(folder)}/", _left_out(paths, records, counts))
    made = _written(named, text.lines(), ctx, local_name(folder), ("text",))
    counts.update({why: text.counts[why] for why in ("empty", "not UTF-8")})
    return made


def _sorted_out(paths: list[str]) -> tuple[list[str], list[str]]:
    """The files of records, and those that neither are such nor often lie beside them."""
    files = [path for path in paths if path.endswith(SUFFIXES)]
    records = [path for path in files if not _is_beside(path)] or files
    taken = set(records)
    return records, [path for path in paths if path not in taken and not (records and _is_beside(path))]


def _is_beside(path: str) -> bool:
    parts = path.split("/")
    return any(part.startswith(("_", ".")) for part in parts) or BESIDE.fullmatch(parts[-1]) is not None


def _left_out(paths: list[str], records: list[str], counts: Counter[str]) -> str:
    """What to say of the files that lie beside those of records; empty where there is none."""
    others = set(paths) - set(records)
    counts["beside the data"] += len(others)
    return f"left out, as they lie beside the data: {listed(others)}" if others else ""


def _refuse_results(paths: list[str], folder: Path, include: str) -> None:
    """Raises BadInput where a folder holds what stages make of text, which is no text."""
    if a.ARTIFACT_FILE in paths:
        raise BadInput(
            f"{include}: {folder} is the result of a stage, as it holds {a.ARTIFACT_FILE}. To read files of records in it, "
            f'name them, e.g. {include}: ["**/*.jsonl"]'
        )
    found = set(paths)
    for path in paths:
        prefix = path.removesuffix(".idx")
        if prefix != path and bin_path(prefix).as_posix() in found:
            raise BadInput(
                f"{include}: {folder} holds tokens ({prefix}.bin and {prefix}.idx), not text. Name the text that they were "
                f"made of, or leave them out with {include}"
            )


def _copied(named: NamedSource, root: Path, paths: list[str], ctx: Context, origin: str, note: str) -> a.RawSet:
    """Files of records, as they are; `origin` with a path behind it is what a person calls one."""
    if note:
        ctx.log(f"{named.key}.source: {note}")
    names, total, done = [], sum((root / path).stat().st_size for path in paths), 0
    if not total:
        raise BadInput(f"{named.key}.source: {named.settings.source} is empty")
    for number, path in enumerate(paths, start=1):
        name = f"{named.name}/{path}"
        (ctx.scratch / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(root / path, ctx.scratch / name)
        names.append(name)
        done += (root / path).stat().st_size
        ctx.progress(done, total, f"{number:,} of {len(paths):,} files, {words.size(done)} of {words.size(total)}")
    origins = tuple(f"{origin}{path}" for path in paths)
    return _set(named, tuple(names), origins, named.settings.text_columns, documents=None, text_bytes=total)


def _written(
    named: NamedSource, lines: Iterator[Line], ctx: Context, origin: str, columns: tuple[str, ...], revision: str | None = None
) -> a.RawSet:
    """Documents as lines of one file, with their text under `columns`."""
    documents = text_bytes = 0
    name = f"{named.name}.jsonl"
    with (ctx.scratch / name).open("wb") as file:
        for line, size in lines:
            file.write(line)
            documents += 1
            text_bytes += size
    return _set(named, (name,), (origin,), columns, documents=documents, text_bytes=text_bytes, revision=revision)


def _set(
    named: NamedSource, files: tuple[str, ...], origins: tuple[str, ...], columns: tuple[str, ...], *, documents: int | None,
    text_bytes: int, revision: str | None = None,
) -> a.RawSet:  # fmt: skip
    source = named.settings
    path = Path(source.source).expanduser()
    return a.RawSet(
        name=named.name,
        key=named.key,
        role=named.role,
        files=files,
        origins=origins,
        format=source.format,
        text_columns=columns,
        columns=source.columns,
        source=local_name(path) if path.exists() or is_glob(source.source) else source.source,
        revision=revision,
        documents=documents,
        text_bytes=text_bytes,
    )
