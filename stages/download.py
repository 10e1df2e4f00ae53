"""Fetch the base model and the text: from the Hugging Face Hub, or from this disk.

A model becomes a Hugging Face folder under `files/`: safetensors, configuration, tokenizer and licence, nothing else of the
repo. Pickled weights are refused, as reading them can run code; with `allow_pickle` they are read with `weights_only` and
stored as safetensors, so that no later stage meets a pickle. Text becomes `data.jsonl`, one `{"id", "text"}` per line.

From the Hub nothing large passes through memory. A model arrives through the Hub's own client in a cache of this result's own
inside the workspace: a connection that breaks is resumed within the file, and a run that was stopped keeps the files that are
complete. The token is read from the environment variable HF_TOKEN and goes to the Hub only; HF_ENDPOINT names another Hub.
"""

import difflib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling

from megatron_core_impl.models import families
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec
from stages.hub_errors import Repo, endpoint, hub_token, is_of_hub, is_unreachable, told
from stages.model_files import (
    CONFIG,
    TOKENIZER_FILES,
    copy_file,
    listed,
    read_json,
    stored_dtype,
    unpickle,
    wanted,
)
from stages.runtime import BadInput, Context
from stages.text_sources import JsonLines, SourceFiles, json_line

WORKERS = 4  # files that arrive at once; each holds a block of 10 MiB
ATTEMPTS = 5  # in a row that completed no file
MODEL_INSTEAD = "set model.source to a local folder"
DATA_INSTEAD = "set data.source to a local .jsonl file or folder"


def run(spec: DownloadModelSpec | DownloadDataSpec, ctx: Context) -> a.ModelArtifact | a.RawDataArtifact:
    """Fetch a model or text.

    Raises:
        BadInput: the source does not exist, may not be read, is incomplete or not supported; the message says what to do.
    """
    # The client of the Hub's storage would take a quarter of the machine's memory for its buffers.
    for name, size in (("SIZE", "128mb"), ("PERFILE_SIZE", "32mb"), ("LIMIT", "256mb")):
        os.environ.setdefault(f"HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_{name}", size)
    return _model(spec, ctx) if isinstance(spec, DownloadModelSpec) else _data(spec, ctx)


# Models


def _model(spec: DownloadModelSpec, ctx: Context) -> a.ModelArtifact:
    source, files = spec.model.source, ctx.scratch / "files"
    files.mkdir()
    folder = local_source(source, "model.source")
    if folder is None:
        revision, arrived_as = _fetch_model(spec, ctx, files)
    else:
        revision, arrived_as = None, dict[str, str]()
        if not folder.is_dir():
            raise BadInput(f"model.source: {folder} is a file; it must be a Hugging Face folder, with {CONFIG} in it")
        names = {path.name for path in folder.iterdir() if path.is_file()}
        for name in wanted(names, lambda name: read_json(folder / name), str(folder), spec.model.allow_pickle):
            copy_file(folder / name, files / name)
    unpickle(files)
    artifact = _describe(spec, ctx, files, revision, source if folder is None else local_name(folder))
    for name, digest in arrived_as.items():
        record = artifact.files.get(f"files/{name}")
        if record is not None and record.sha256 != digest:
            shutil.rmtree(_cache(spec, ctx))
            raise BadInput(f"model.source: {name} of {source} arrived damaged: its SHA-256 is not the Hub's. Run again")
    shutil.rmtree(_cache(spec, ctx), ignore_errors=True)  # the artifact has the files now
    return artifact


def _describe(spec: DownloadModelSpec, ctx: Context, files: Path, revision: str | None, source: str) -> a.ModelArtifact:
    """The artifact of the model in `files`: its facts, from its configuration and the headers of its weights."""
    config = families.config_from_hf(read_json(files / CONFIG))
    parameters = families.count_parameters(config)
    dtype = stored_dtype(files)
    size = sum(path.stat().st_size for path in files.glob("*.safetensors"))
    return ctx.artifact(
        a.ModelArtifact,
        figure=f"{words.short(parameters)} parameters, vocabulary {config.vocab_size:,}, {dtype}, {words.size(size)}",
        model=a.ModelFacts(**vars(config), dtype=dtype, parameters=parameters),
        tokenizer_files=tuple(sorted(name for name in TOKENIZER_FILES if (files / name).exists())),
        license=_license(files / "README.md"),
        source=source,
        revision=revision,
    )


def _fetch_model(spec: DownloadModelSpec, ctx: Context, files: Path) -> tuple[str, dict[str, str]]:
    """Fetch a model from the Hub into `files`. Returns its commit and, by name, the SHA-256 that large files must have."""
    repo_id, cache = spec.model.source, _cache(spec, ctx)
    api = HfApi(token=hub_token())
    repo = Repo(
        "model", repo_id, "model.source", MODEL_INSTEAD, spec.model.revision, partial(_revisions, api, repo_id, "model")
    )
    with told(repo):
        info = api.model_info(repo_id, revision=spec.model.revision, files_metadata=True)
        commit = str(info.sha)
        siblings = {s.rfilename: s for s in info.siblings or [] if "/" not in s.rfilename}

        def read(name: str) -> Any:
            path = hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, token=hub_token())
            return read_json(Path(path))

        names = wanted(set(siblings), read, repo_id, spec.model.allow_pickle)
        ctx.log(f"fetching {len(names)} files of {repo_id} at {commit[:12]} from {endpoint()}")
        snapshot = _snapshot(repo_id, commit, [siblings[name] for name in names], cache, ctx)
    for name in names:
        (files / name).hardlink_to((snapshot / name).resolve())
    return commit, {name: lfs.sha256 for name in names if (lfs := siblings[name].lfs)}


def _snapshot(repo_id: str, commit: str, files: list[RepoSibling], cache: Path, ctx: Context) -> Path:
    """Bring files of a repo into the client's cache, whatever the connection does, and return their folder there."""

    def missing() -> list[RepoSibling]:
        return [f for f in files if not isinstance(try_to_load_from_cache(repo_id, f.rfilename, cache, commit), str)]

    arrival = _Arrival(sum(file.size or 0 for file in missing()), ctx)
    fetch = partial(
        snapshot_download, repo_id, revision=commit, cache_dir=cache, token=hub_token(), max_workers=WORKERS,
        allow_patterns=[escape(file.rfilename) for file in files], tqdm_class=partial(_Bar, arrival),
    )  # fmt: skip
    failures, left = 0, len(missing())
    while True:
        # In a thread of its own, so that a signal, which reaches this one, can end the transfer in the middle of a file.
        with ThreadPoolExecutor(1) as thread:
            try:
                return Path(thread.submit(fetch).result())
            except BaseException as error:
                arrival.stopped = True  # of the other files, too: leaving this block waits for the thread
                # The client itself goes on within a file after most kinds of break. After the others it starts that file anew.
                before, left = left, len(missing())
                failures = 1 if left < before else failures + 1
                if failures == ATTEMPTS or not is_unreachable(error):
                    raise
                ctx.warn(f"the connection broke ({type(error).__name__}); going on with {left} files")
        time.sleep(2 ** (failures - 1))
        arrival.stopped = False


class _Arrival:
    """How many bytes have arrived, over all files."""

    def __init__(self, total: int, ctx: Context) -> None:
        self.total, self.ctx = total, ctx
        self.done = 0
        self.stopped = False  # set from outside: nothing more shall arrive

    def report(self, done: int) -> None:
        if self.stopped:
            raise InterruptedError("the stage was stopped")
        self.done = max(self.done, done)
        self.ctx.progress(self.done, self.total, f"{words.size(self.done)} of {words.size(self.total)}")


class _Bar:
    """What the client takes for a tqdm bar. It makes several: of files, of bytes received, of bytes written."""

    def __init__(self, arrival: _Arrival, *_: Any, total: float | None = None, unit: str = "", **__: Any) -> None:
        self.arrival, self.total, self.counts_bytes, self.n = arrival, total, unit == "B", 0
        self.format_dict: dict[str, Any] = {}

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        if self.counts_bytes:
            self.arrival.report(self.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def refresh(self) -> None: ...

    def close(self) -> None: ...

    def set_description(self, *_: Any, **__: Any) -> None: ...

    def set_description_str(self, *_: Any, **__: Any) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...


def _license(readme: Path) -> str | None:
    """The licence that the front matter of a model card names."""
    if not readme.exists():
        return None
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data
    except ValueError:
        return None
    if data.get("license") == "other" and data.get("license_name"):
        return f"other ({data['license_name']})"
    licenses = data.get("license")
    return ", ".join(licenses) if isinstance(licenses, list) else licenses


# Text


def _data(spec: DownloadDataSpec, ctx: Context) -> a.RawDataArtifact:
    data = spec.data
    path = local_source(data.source, "data.source")
    revision, what, counts = None, "documents", Counter[str]()
    if path is None:
        revision, lines = _hub_documents(spec, ctx)
    elif path.is_dir():
        workspace = ctx.workspace.resolve()
        files = SourceFiles(path.resolve(), data.include, data.exclude, ctx.progress, workspace)
        lines, counts, what = files.lines(), files.counts, "files"
    elif path.suffix in (".jsonl", ".ndjson"):
        jsonl = JsonLines(path, data.text_column, ctx.progress)
        lines, counts = jsonl.lines(), jsonl.counts
    else:
        raise BadInput(f"data.source: {path} is neither a folder nor a .jsonl file. Give one document per line, as JSON")
    documents = text_bytes = 0
    with (ctx.scratch / "data.jsonl").open("wb") as file:
        for line, size in lines:
            file.write(line)
            documents += 1
            text_bytes += size
    left_out = {what: count for what, count in counts.items() if what != "documents" and count}
    if count := left_out.pop("malformed", 0):
        documents -= count
        ctx.warn(f"{count:,} lines of {data.source} are no documents; preprocess refuses or counts them")
    note = f" (left out: {', '.join(f'{count:,} {what}' for what, count in left_out.items())})" if left_out else ""
    return ctx.artifact(
        a.RawDataArtifact,
        figure=f"{documents:,} {what}, {words.size(text_bytes)} of text{note}",
        metrics=dict(counts),
        documents=documents,
        source=data.source if path is None else local_name(path),
        revision=revision,
        text_bytes=text_bytes,
    )


def _hub_documents(spec: DownloadDataSpec, ctx: Context) -> tuple[str, Iterator[tuple[bytes, int]]]:
    """The commit of a dataset on the Hub, and its documents as they arrive."""
    data = spec.data
    api = HfApi(token=hub_token())
    repo = Repo(
        "dataset", data.source, "data.source", DATA_INSTEAD, data.revision, partial(_revisions, api, data.source, "dataset")
    )
    with told(repo):
        commit = str(api.dataset_info(data.source, revision=data.revision).sha)
        api.auth_check(data.source, repo_type="dataset")  # a gated dataset tells everyone its commit
    return commit, _rows(spec, ctx, commit, repo)


def _rows(spec: DownloadDataSpec, ctx: Context, commit: str, repo: Repo) -> Iterator[tuple[bytes, int]]:
    """The documents of a dataset, streamed through `datasets`: each as a line, and the size of its text in bytes.

    Raises:
        BadInput: the subset, folder, split or column does not exist, with a list of those that do; or a row is no text.
    """
    data, number = spec.data, 0
    with told(repo):
        try:
            rows, total = _open_split(spec, ctx, commit)
            for number, row in enumerate(rows, start=1):
                text, identity = row[data.text_column], row.get("id")
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise BadInput(f"data.text_column: {data.text_column!r} is {kind}, no text, in row {number} of {repo.id}")
                yield json_line(identity if isinstance(identity, str | int) else number, text), len(text.encode())
                ctx.progress(number, max(total, number + 1), f"{number:,}{f' of {total:,}' if total else ''} documents")
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            if is_of_hub(error):
                raise
            raise BadInput(f"data.source: datasets cannot read row {number + 1} of {repo.id}: {_one_line(error)}") from None
    if not number:
        raise BadInput(f"data.source: split {data.split} of {repo.id} holds no rows")


def _open_split(spec: DownloadDataSpec, ctx: Context, commit: str) -> tuple[Iterable[dict[str, Any]], int]:
    """The rows of the split, with only the columns that are needed, and their number, 0 where the dataset does not say.

    Raises:
        BadInput: the subset, folder, split or column does not exist.
    """
    os.environ["USE_TORCH"] = "0"  # torch takes seconds to load, and datasets wants it only to feed a DataLoader
    import datasets

    data = spec.data
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(
            data.source, data.subset, data_dir=data.data_dir, revision=commit, token=hub_token(), streaming=True,
            cache_dir=str(ctx.workspace / ".cache" / "datasets"),
        )  # fmt: skip
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if is_of_hub(error):
            raise
        setting = "data.data_dir" if data.data_dir else "data.subset"
        raise BadInput(f"{setting}: datasets cannot open {data.source}: {_one_line(error)}") from None
    if data.split not in splits:
        raise BadInput(f"data.split: {data.source} has no split {data.split!r}. It has: {', '.join(map(str, splits))}")
    rows = splits[data.split]
    columns = rows.column_names or list(next(iter(rows), {data.text_column: ""}))
    if data.text_column not in columns:
        raise BadInput(f"data.text_column: {data.source} has no column {data.text_column!r}. It has: {', '.join(columns)}")
    info = (rows.info.splits or {}).get(data.split)
    return rows.select_columns([c for c in columns if c in (data.text_column, "id")]), info.num_examples if info else 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Both


def local_source(source: str, setting: str) -> Path | None:
    """The file or folder on this disk that a source means, None when it is a Hub id.

    Raises:
        BadInput: it looks like a path, and nothing is there.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not re.match(r"[./~]|.*\.jsonl$", source):
        return None
    near = difflib.get_close_matches(path.name, [p.name for p in _inside(path.parent)], n=1)
    if near:
        hint = f"Did you mean {path.parent / near[0]}?"
    elif path.parent.is_dir():
        hint = f"{path.parent.resolve()} holds: {listed({p.name for p in _inside(path.parent)})}"
    else:
        hint = f"Nor is there a folder {path.parent}"
    raise BadInput(f"{setting}: there is no {source}. {hint}. A name on the Hub is owner/name")


def local_name(path: Path) -> str:
    """What an artifact calls a file or folder of this disk: no more of its path than the last name."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _cache(spec: DownloadModelSpec, ctx: Context) -> Path:
    """Where the Hub's client keeps what has arrived, for this result alone."""
    return ctx.workspace / ".cache" / "hub" / spec.key


def _revisions(api: HfApi, repo_id: str, kind: str) -> str:
    """Names of a repo's branches and tags, for a person."""
    try:
        refs = api.list_repo_refs(repo_id, repo_type=kind)
    except Exception:  # it only completes a message
        return ""
    return listed({ref.name for ref in [*refs.branches, *refs.tags]})


if __name__ == "__main__":
    runtime.main({"model": "download-model", "data": "download-data"}, run, __doc__)
