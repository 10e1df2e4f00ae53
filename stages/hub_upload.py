"""Files to a repo of the Hub: sent one by one, published by one commit, compared, tagged.

Why not the client's `upload_folder` (in huggingface_hub 2 it is what `upload_large_folder` was): it commits in parts when
there are many files, when they take long, or when a commit fails, so that somebody who loads the model in between gets half of
one; and all that it sends is one transaction of the storage. Here each large file is a transaction of its own
(`preupload_lfs_files`), nothing of which is visible, and `create_commit` then names all of them, and deletes what an earlier
push left, at once: a reader sees the old model or the new one. After an interruption (kill -9, no network) the same call goes
on: of what the storage has, nothing is sent again. That is whole files over plain HTTP, and pieces of a few dozen kilobytes
with Xet, the Hub's own storage, of which `hf_xet` keeps a record under `<workspace>/.cache`, written every 20 seconds.

The Hub's record of a file is compared with ours: size, SHA-256 (git's hash of a small file), and where Xet has it the hash that
Xet computed over what it holds.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.logging import set_verbosity
from huggingface_hub.utils.tqdm import disable_progress_bars

from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.config import PushSettings
from stages.hub_errors import Repo, address, endpoint, hub_token, is_passing, told
from stages.model_files import TOKENIZER_FILES, listed
from stages.outcomes import BadInput, GateFailed

# What an earlier push may have left, and transformers would load in place of what is published now, or beside it.
STALE = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "generation_config.json", *TOKENIZER_FILES,
]  # fmt: skip
KEPT = "what has arrived is not sent again, and nothing is published before all of it has"
SMALL = 16 << 20  # bytes; files below are sent together
PAUSES = (2, 10, 30, 60)  # seconds before a call that failed is made again; the client has tried for half a minute each time
HEARTBEAT = 30  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """Where the model is now."""

    target: str
    commit: str | None = None
    private: bool | None = None


@dataclass(frozen=True)
class Push:
    """One upload: to which branch of which repo, of which files."""

    api: HfApi
    settings: PushSettings
    repo_id: str
    sources: Mapping[str, Path]  # name in the repo -> file here
    records: Mapping[str, a.PublishedFile]
    ctx: Context


def to_hub(
    settings: PushSettings, sources: Mapping[str, Path], records: Mapping[str, a.PublishedFile], ctx: Context
) -> Published:
    """Make the repo and the branch, upload, compare, tag.

    Raises:
        BadInput: the Hub refuses, has the repo as a public one, or the tag elsewhere.
        GateFailed: a file on the Hub differs.
    """
    assert settings.repo is not None  # the settings saw to it
    token = hub_token()
    if not token:
        raise BadInput(
            f"push.to=hub needs a token: set the environment variable HF_TOKEN to one with the role write from "
            f"{address()}/settings/tokens"
        )
    set_verbosity(logging.ERROR)  # its warnings have addresses with signatures in them
    disable_progress_bars()
    cache = ctx.workspace / ".cache" / "push" / ctx.spec.key
    os.environ.setdefault("HF_XET_CACHE", str(cache))  # in the workspace, which outlives a container
    push = Push(HfApi(endpoint=endpoint(), token=token), settings, settings.repo, sources, records, ctx)
    instead = "choose another push.branch or push.repo, or publish to a folder (push.to: folder)"
    with told(Repo("model", settings.repo, "push.repo", instead, settings.branch, kept=KEPT)):
        is_private = _open_repo(push)
        head, tagged = _open_branch(push)
        if tagged is not None:
            _refuse_tag_elsewhere(push, head, tagged)
            commit = tagged
            ctx.log(f"{settings.repo} has this model already, as {settings.tag}")
        else:
            ctx.log(f"uploading {words.counted(len(records), 'file')} to branch {settings.branch} of {settings.repo}")
            operations = _send(push)
            commit = _patiently(push, partial(_commit, push, head, operations))
            if differing := _patiently(push, partial(_differing, push, commit)):
                raise GateFailed(
                    f"after the upload {len(differing)} of {len(records)} files of {address()}/{settings.repo} are missing or "
                    f"differ from those here: {listed(differing)}. Do not use commit {commit}; run again"
                )
            if settings.tag is not None:
                _patiently(push, partial(_tag, push, commit))
    shutil.rmtree(cache, ignore_errors=True)
    return Published(f"{address()}/{settings.repo}", commit, is_private)


# ── Before anything is sent ─────────────────────────────────────────────────────────────────────────────────────────────────


def _open_repo(push: Push) -> bool:
    """Make the repo unless it is there; returns whether it is private.

    Raises:
        BadInput: it is public and shall not be.
    """
    settings, repo_id = push.settings, push.repo_id
    try:
        info = push.api.model_info(repo_id)
    except RepositoryNotFoundError:
        push.api.create_repo(repo_id, private=settings.private, exist_ok=True)
        info = push.api.model_info(repo_id)
    if settings.private and not info.private:
        raise BadInput(
            f"push.private: {repo_id} exists and is public. Make it private at {address()}/{repo_id}/settings, choose "
            "another push.repo, or set push.private: false"
        )
    if info.private and not settings.private:
        push.ctx.warn(f"{repo_id} exists and is private, and stays so. Make it public at {address()}/{repo_id}/settings")
    return bool(info.private)


def _open_branch(push: Push) -> tuple[str | None, str | None]:
    """Make the branch unless it is there; returns its commit, and that of the tag if it exists.

    Raises:
        BadInput: a name is taken by the other kind.
    """
    settings, repo_id = push.settings, push.repo_id
    refs = push.api.list_repo_refs(repo_id)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    for key, name, others, kind in (("branch", settings.branch, tags, "tag"), ("tag", settings.tag, branches, "branch")):
        if name in others:
            raise BadInput(f"push.{key}: {name} is a {kind} of {repo_id}. Choose another name")
    if settings.branch not in branches and branches:
        push.api.create_branch(repo_id, branch=settings.branch, exist_ok=True)
        push.ctx.log(f"made branch {settings.branch} of {repo_id}")
        branches[settings.branch] = _head(push) or ""
    return branches.get(settings.branch), tags.get(settings.tag or "")


def _refuse_tag_elsewhere(push: Push, head: str | None, tagged: str) -> None:
    """A tag stays where it is. It is no obstacle where it names what would be published.

    Raises:
        BadInput: it names something else.
    """
    if tagged != head or _differing(push, tagged) or _stale(push, tagged):
        raise BadInput(
            f"push.tag: {push.repo_id} has the tag {push.settings.tag} at commit {tagged[:12]}, which is not what would be "
            f"published now. Choose another push.tag, or delete that one at {address()}/{push.repo_id}/tree/{tagged}"
        )


# ── Sending ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _send(push: Push) -> list[CommitOperationAdd]:
    """Bring all large files to the storage; returns what a commit needs to name them."""
    operations = [CommitOperationAdd(name, source) for name, source in push.sources.items()]
    operations.sort(key=lambda operation: operation.upload_info.size)
    small = [operation for operation in operations if operation.upload_info.size < SMALL]
    large = operations[len(small) :]
    total, done = sum(operation.upload_info.size for operation in operations), 0
    for together in [small, *([operation] for operation in large)]:  # the small ones first: they show whether it is allowed
        name = together[0].path_in_repo if len(together) == 1 else words.counted(len(together), "file")
        send = partial(
            push.api.preupload_lfs_files, push.repo_id, together, revision=push.settings.branch, free_memory=False
        )  # fmt: skip
        text = f"{words.size(done)} of {words.size(total)}"
        _patiently(push, partial(_beside, push, send, f"{text}, sending {name}", done / max(total, 1)))
        done += sum(operation.upload_info.size for operation in together)
        push.ctx.progress(done, total, f"{words.size(done)} of {words.size(total)}")
    return operations


def _commit(push: Push, head: str | None, operations: Sequence[CommitOperationAdd]) -> str:
    """Publish what was sent; returns the commit. To be called again when its answer was lost.

    Raises:
        BadInput: the branch is no longer what it was.
    """
    now = _head(push)
    if now is not None and now != head:
        if not _differing(push, now):
            return now  # our own commit, whose answer did not arrive
        raise BadInput(
            f"somebody else has changed branch {push.settings.branch} of {push.repo_id} in the meantime: look at "
            f"{address()}/{push.repo_id}/commits/{push.settings.branch}, then run again: {KEPT}"
        )
    stale = [] if head is None else _stale(push, head)
    commit = partial(
        push.api.create_commit, push.repo_id, [*map(CommitOperationDelete, stale), *operations], parent_commit=head,
        commit_message=push.settings.commit_message, revision=push.settings.branch,
    )  # fmt: skip
    return str(_beside(push, commit, "publishing", 1.0).oid)


def _tag(push: Push, commit: str) -> None:
    assert push.settings.tag is not None
    push.api.create_tag(push.repo_id, tag=push.settings.tag, revision=commit, exist_ok=True)
    tags = {ref.name: ref.target_commit for ref in push.api.list_repo_refs(push.repo_id).tags}
    if (there := tags.get(push.settings.tag)) != commit:
        raise BadInput(
            f"push.tag: somebody else has set {push.settings.tag} of {push.repo_id} to commit {there} in the meantime. The "
            f"model is published as commit {commit}; choose another push.tag, then run again: {KEPT}"
        )


# ── What is there ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head(push: Push) -> str | None:
    """The commit of the branch, None where there is none."""
    refs = push.api.list_repo_refs(push.repo_id)
    return next((ref.target_commit for ref in refs.branches if ref.name == push.settings.branch), None)


def _tree(push: Push, commit: str) -> dict[str, RepoFile]:
    entries = push.api.list_repo_tree(push.repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _stale(push: Push, commit: str) -> list[str]:
    """Files of a commit that must not stay beside ours."""
    names = (name for name in _tree(push, commit) if name not in push.records)
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in STALE))


def _differing(push: Push, commit: str) -> list[str]:
    """Names of our files that a commit lacks, or has with another content."""
    there = _tree(push, commit)
    differing = [name for name, record in push.records.items() if not _same(there.get(name), record, push.sources[name])]
    in_xet = [name for name in push.records if name not in differing and there[name].xet_hash is not None]
    if in_xet and importlib.util.find_spec("hf_xet") is not None:
        hashes = importlib.import_module("hf_xet").hash_files([str(push.sources[name]) for name in in_xet])
        differing += [name for name, ours in zip(in_xet, hashes, strict=True) if there[name].xet_hash != ours.hash]
    return differing


def _same(there: RepoFile | None, record: a.PublishedFile, here: Path) -> bool:
    """Whether a file of the Hub has the content of one here: by SHA-256 where it is a large file, else by git's hash."""
    if there is None or there.size != record.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == record.sha256)
    content = here.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


# ── Patience ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _patiently(push: Push, call: Callable[[], T]) -> T:
    """What a call returns, which is made again, a few times, while the Hub is away or overloaded."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            push.ctx.warn(f"the Hub does not answer ({type(error).__name__}); trying again in {pause} seconds")
        time.sleep(pause)
    return call()


def _beside(push: Push, call: Callable[[], Any], text: str, share: float) -> Any:
    """What a call returns, made in a thread: this one says that it goes on, and a signal can end it at any moment."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started = time.monotonic()
    while thread.is_alive():
        thread.join(HEARTBEAT)
        if thread.is_alive():
            push.ctx.progress(share, 1.0, f"{text}, for {words.seconds(time.monotonic() - started)}")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
