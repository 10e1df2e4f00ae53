"""Rows of a dataset, one at a time, as JSON lines: of the Hub, streamed through `datasets`, or saved to disk by it.

Nothing large is in memory: rows come from the Hub as they are read, and from a disk mapped into memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_core_impl.data.conversations import keys_of
from stages.contracts.data_settings import SourceSettings
from stages.hub_errors import Repo, hub_token, is_of_hub, names_of_revisions, told
from stages.outcomes import BadInput
from stages.text_sources import Line, Progress

DATA_INSTEAD = "set data.source to a local file or folder"
SAVED = ("dataset_dict.json", "state.json")  # one of them lies in what `save_to_disk` makes


def is_saved(folder: Path) -> bool:
    """Whether a folder is a dataset that `save_to_disk` made."""
    return any((folder / name).exists() for name in SAVED)


def of_hub(source: SourceSettings, key: str, cache: Path, progress: Progress) -> tuple[str, Iterator[Line]]:
    """The commit of a dataset on the Hub, and its documents as they arrive.

    Args:
        key: of the source in the configuration.
        cache: folder for what `datasets` keeps.

    Raises:
        BadInput: it does not exist or may not be read; and while it is read, as `_rows`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=hub_token())
    revisions = partial(names_of_revisions, api, source.source, "dataset")
    repo = Repo("dataset", source.source, f"{key}.source", DATA_INSTEAD, source.revision, revisions)
    with told(repo):
        commit = str(api.dataset_info(source.source, revision=source.revision).sha)
        api.auth_check(source.source, repo_type="dataset")  # a gated dataset tells everyone its commit
    return commit, _told_rows(source, key, commit, cache, repo, progress)


def of_disk(source: SourceSettings, key: str, folder: Path, progress: Progress) -> Iterator[Line]:
    """The documents of a dataset that `save_to_disk` made. Raises BadInput as `_rows`."""
    datasets = _library()
    try:
        saved = datasets.load_from_disk(str(folder))
    except (ValueError, OSError) as error:
        raise BadInput(f"{key}.source: datasets cannot open {folder}: {_one_line(error)}") from None
    if isinstance(saved, dict):
        splits = saved
    else:  # one alone need not be asked for by its name
        is_default = source.split == SourceSettings.model_fields["split"].default
        splits = {source.split if is_default else str(saved.split or "train"): saved}
    return _rows(source, key, splits, str(folder), progress)


def _told_rows(
    source: SourceSettings, key: str, commit: str, cache: Path, repo: Repo, progress: Progress
) -> Iterator[Line]:  # fmt: skip
    with told(repo):
        try:
            splits = _library().load_dataset(
                source.source, source.subset, data_dir=source.data_dir, revision=commit, token=hub_token(), streaming=True,
                cache_dir=str(cache),
            )  # fmt: skip
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            if is_of_hub(error):
                raise
            setting = "data_dir" if source.data_dir else "subset"
            raise BadInput(f"{key}.{setting}: datasets cannot open {source.source}: {_one_line(error)}") from None
        yield from _rows(source, key, splits, source.source, progress)


def _rows(source: SourceSettings, key: str, splits: Any, name: str, progress: Progress) -> Iterator[Line]:
    """The rows of a split, as lines, whatever they hold: what is no text is for preprocess to count.

    Raises:
        BadInput: the split or a column does not exist, with a list of those that do; or a row cannot be read.
    """
    number = 0
    for number, (row, total) in enumerate(_read(source, key, splits, name), start=1):
        identity = row.get("id")
        identity = identity if isinstance(identity, str | int) else number
        content = {column: row[column] for column in source.text_columns} if source.content == "text" else row
        try:
            line = json.dumps({"id": identity, **content}, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise BadInput(f"{key}.source: row {number} of {name} cannot be written as JSON: {_one_line(error)}") from None
        texts = [text for text in content.values() if isinstance(text, str)] if source.content == "text" else []
        yield line, sum(len(text.encode()) for text in texts) if texts else len(line)
        progress(number, max(total, number + 1), f"{number:,}{f' of {total:,}' if total else ''} documents")
    if not number:
        raise BadInput(f"{key}.source: split {source.split} of {name} holds no rows")


def _read(source: SourceSettings, key: str, splits: Any, name: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a split, each with the number of all."""
    number = 1
    try:
        rows, total = _open_split(source, key, splits, name)
        for row in rows:
            yield row, total
            number += 1
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if is_of_hub(error):
            raise
        raise BadInput(f"{key}.source: datasets cannot read row {number} of {name}: {_one_line(error)}") from None


def _open_split(source: SourceSettings, key: str, splits: Any, name: str) -> tuple[Iterable[dict[str, Any]], int]:
    """The rows of the split, with only the columns that are needed, and their number, 0 where the dataset does not say.

    Raises:
        BadInput: the split or a column does not exist, or the column is of another type than text.
    """
    if source.split not in splits:
        raise BadInput(f"{key}.split: {name} has no split {source.split!r}. It has: {', '.join(map(str, splits))}")
    rows = splits[source.split]
    columns = rows.column_names or list(next(iter(rows), {}))
    if source.format == "text":
        for column in source.text_columns:
            if column not in columns:
                raise BadInput(f"{key}.text_column: {name} has no column {column!r}. It has: {', '.join(columns)}")
            feature = (rows.features or {}).get(column)
            kind = str(getattr(feature, "dtype", None) or type(feature).__name__)
            if feature is not None and "string" not in kind and kind != "null":
                raise BadInput(f"{key}.text_column: column {column!r} of {name} holds {kind}, no text. Name another one")
        wanted = set(source.text_columns)
    else:
        assert source.format != "tokenized", "these are files"
        keys, required = keys_of(source.format, source.columns)
        if missing := set(required) - set(columns):
            raise BadInput(
                f"{key}.columns: {name} lacks {', '.join(sorted(missing))}, which format {source.format} needs. "
                f"It has: {', '.join(columns)}"
            )
        wanted = set(keys)
    info = (rows.info.splits or {}).get(source.split)
    total = len(rows) if hasattr(rows, "__len__") else info.num_examples if info else 0
    return rows.select_columns([column for column in columns if column in wanted | {"id"}]), total


def _library() -> Any:
    os.environ["USE_TORCH"] = "0"  # torch takes seconds to load, and datasets wants it only to feed a DataLoader
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
