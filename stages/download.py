"""Fetch the base model and the text: from the Hugging Face Hub, or from this disk.

A model becomes a Hugging Face folder under `files/`: safetensors, configuration, tokenizer and licence, nothing else of the
repo. Pickled weights are refused, as reading them can run code; with `allow_pickle` they are read with `weights_only` and
stored as safetensors, so that no later stage meets a pickle. A local checkpoint of Meta or Megatron-LLM becomes such a folder,
too: `foreign_model`. What becomes of text: `raw_data`.

From the Hub nothing large passes through memory. A model arrives through the Hub's own client in a cache of this result's own
inside the workspace: a connection that breaks is resumed within the file, and a run that was stopped keeps the files that are
complete. The token is read from the environment variable HF_TOKEN and goes to the Hub only; HF_ENDPOINT names another Hub.
"""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling

from megatron_core_impl.checkpoint.digests import file_sha256
from megatron_core_impl.json_files import read_json
from megatron_core_impl.models import families
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.model_sources import CONFIG_IS_THERE, kind_of, stored_tensors
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec
from stages.hub_errors import Repo, endpoint, hub_token, is_unreachable, names_of_revisions, told
from stages.local_source import local_name, local_source
from stages.model_files import (
    CONFIG,
    TOKENIZER_FILES,
    copy_file,
    most_common_dtype,
    unpickle,
    wanted,
)
from stages.outcomes import BadInput
from stages.raw_data import collect

WORKERS = 4  # files that arrive at once; each holds a block of 10 MiB
ATTEMPTS = 5  # in a row that completed no file
MODEL_INSTEAD = "set model.source to a local folder"


def run(spec: DownloadModelSpec | DownloadDataSpec, ctx: Context) -> a.ModelArtifact | a.RawDataArtifact:
    """Fetch a model or text.

    Raises:
        BadInput: the source does not exist, may not be read, is incomplete or not supported; the message says what to do.
    """
    # The client of the Hub's storage would take a quarter of the machine's memory for its buffers.
    for name, size in (("SIZE", "128mb"), ("PERFILE_SIZE", "32mb"), ("LIMIT", "256mb")):
        os.environ.setdefault(f"HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_{name}", size)
    return _model(spec, ctx) if isinstance(spec, DownloadModelSpec) else collect(spec, ctx)


def _model(spec: DownloadModelSpec, ctx: Context) -> a.ModelArtifact:
    source, files = spec.model.source, ctx.scratch / "files"
    files.mkdir()
    folder = local_source(source, "model.source")
    try:
        kind = kind_of(folder) if folder is not None and folder.is_dir() else "huggingface"
    except ValueError as error:
        raise BadInput(f"model.source: {error}") from None
    if spec.model.config and kind == "huggingface":
        raise BadInput(f"{CONFIG_IS_THERE}: change it there, in a local copy")
    if folder is None:
        revision, arrived_as = _fetch_model(spec, ctx, files)
    else:
        revision, arrived_as = None, dict[str, str]()
        if not folder.is_dir():
            raise BadInput(f"model.source: {folder} is a file; it must be a folder with a model in it")
        if kind != "huggingface":
            from stages.foreign_model import take_in  # needs torch, whose import takes two seconds

            take_in(folder, kind, spec.model.config, files, ctx)
        else:
            names = {path.name for path in folder.iterdir() if path.is_file()}
            for name in wanted(names, lambda name: read_json(folder / name), str(folder), spec.model.allow_pickle):
                copy_file(folder / name, files / name)
    unpickle(files, source if folder is None else str(folder))
    artifact = _describe(spec, ctx, files, revision, source if folder is None else local_name(folder))
    for name, digest in arrived_as.items():
        if f"files/{name}" in artifact.files and file_sha256(files / name) != digest:
            shutil.rmtree(_cache(spec, ctx))
            raise BadInput(f"model.source: {name} of {source} arrived damaged: its SHA-256 is not the Hub's. Run again")
    shutil.rmtree(_cache(spec, ctx), ignore_errors=True)  # the artifact has the files now
    return artifact


def _describe(spec: DownloadModelSpec, ctx: Context, files: Path, revision: str | None, source: str) -> a.ModelArtifact:
    """The artifact of the model in `files`: its facts, from its configuration and the headers of its weights."""
    config = families.config_from_hf(read_json(files / CONFIG))
    try:
        stored = stored_tensors(files)
        families.check_stored(config, {name: shape for name, (_, shape) in stored.items()})
    except ValueError as error:
        raise BadInput(f"model.source: {spec.model.source}: {str(error).removeprefix(f'{files}/')}") from None
    dtype = most_common_dtype(stored)
    parameters = families.count_parameters(config)
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
        "model", repo_id, "model.source", MODEL_INSTEAD, spec.model.revision, partial(names_of_revisions, api, repo_id, "model")
    )
    with told(repo):
        info = api.model_info(repo_id, revision=spec.model.revision, files_metadata=True)
        commit = str(info.sha)
        siblings = {s.rfilename: s for s in info.siblings or [] if "/" not in s.rfilename}

        def read(name: str) -> dict[str, Any]:
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


def _cache(spec: DownloadModelSpec, ctx: Context) -> Path:
    """Where the Hub's client keeps what has arrived, for this result alone."""
    return ctx.workspace / ".cache" / "hub" / spec.key


if __name__ == "__main__":
    runtime.main({"model": "download-model", "data": "download-data"}, run, __doc__)
