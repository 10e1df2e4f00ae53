"""Publish the exported model with a model card: to the Hugging Face Hub, to a folder, or nowhere (a dry run).

The card, README.md, is made from the artifacts of the run. On the Hub the repo is private unless asked otherwise, and after
the upload every file's digest there is compared with the one here. The token is read from the environment variable HF_TOKEN;
HF_ENDPOINT names another Hub. A folder is replaced as a whole, and only if it is empty or an earlier push made it.

The result holds the card and receipt.json, which names every file that was, or would be, published, with size and SHA-256.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.logging import set_verbosity

from megatron_core_impl.checkpoint.durable import sync
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts import publishing, words
from stages.contracts.config import PushSettings
from stages.contracts.publishing import CARD
from stages.contracts.specs import PushSpec
from stages.hub_errors import Repo, endpoint, hub_token, told
from stages.model_card import Lineage, model_card
from stages.model_files import copy_file, listed
from stages.runtime import BadInput, Context, GateFailed

# Weights of an earlier push that this one does not overwrite would be loaded in place of the new ones.
STALE = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
]  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Where the model is now."""

    target: str
    commit: str | None = None


def run(spec: PushSpec, ctx: Context) -> a.PushArtifact:
    """Make the card and publish.

    Raises:
        BadInput: the target may not be written; the message says what to do.
        GateFailed: what the Hub has after the upload is not what lies here.
    """
    export, folder = ctx.input("export", a.ExportArtifact)
    checkpoint, _ = ctx.input("checkpoint", a.CheckpointArtifact)
    dataset, _ = ctx.input("dataset", a.DatasetArtifact)
    data, _ = ctx.input("data", a.RawDataArtifact)
    verification, _ = ctx.input("verification", a.VerificationArtifact)
    lineage = Lineage(export, checkpoint, dataset, data, verification)

    settings = spec.settings
    files = {n.removeprefix("model/"): r for n, r in export.files.items() if n.startswith("model/")}
    if not any(name.endswith(".safetensors") for name in files):
        raise BadInput(f"inputs.export: {folder / 'model'} holds no weights")
    card = ctx.scratch / CARD
    card.write_text(model_card(lineage, settings.repo or settings.folder or "model"))
    files[CARD] = a.FileRecord(size=card.stat().st_size, sha256=a.file_sha256(card))

    upload = ctx.scratch / "upload"  # the folder as it shall be: the same files as the export's, and the card
    for name in files:
        (upload / name).parent.mkdir(parents=True, exist_ok=True)
        (upload / name).hardlink_to(card if name == CARD else folder / "model" / name)
    published = {"dry-run": _list, "folder": _to_folder, "hub": _to_hub}[settings.to](settings, upload, files, ctx)
    shutil.rmtree(upload)

    receipt = {
        "to": settings.to, "target": published.target, "commit": published.commit,
        "files": {name: record.model_dump(include={"size", "sha256"}) for name, record in sorted(files.items())},
    }  # fmt: skip
    (ctx.scratch / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n")
    return ctx.artifact(
        a.PushArtifact,
        figure=_figure(settings, published, files),
        to=settings.to,
        target=published.target,
        commit=published.commit,
        published=files,
    )


def _figure(settings: PushSettings, published: Published, files: dict[str, a.FileRecord]) -> str:
    what = f"{len(files)} files, {words.size(sum(record.size for record in files.values()))}"
    if settings.to == "dry-run":
        return f"dry run: would upload {what} to {_repo_text(settings)}"
    if settings.to == "hub":
        return f"{what} at {published.target} ({'private' if settings.private else 'public'}), digests equal"
    return f"{what} in {published.target}"


def _repo_text(settings: PushSettings) -> str:
    return f"{'a private' if settings.private else 'a public'} repo{f' {settings.repo}' if settings.repo else ''}"


def _list(settings: PushSettings, upload: Path, files: dict[str, a.FileRecord], ctx: Context) -> Published:
    """Say what would be uploaded."""
    ctx.log(f"would upload to {_repo_text(settings)}:")
    for name, record in sorted(files.items()):
        ctx.log(f"  {words.size(record.size):>12}  {name}")
    return Published(f"{endpoint()}/{settings.repo}" if settings.repo else "")


# A folder


def _to_folder(settings: PushSettings, upload: Path, files: dict[str, a.FileRecord], ctx: Context) -> Published:
    """Copy the model beside the target, then rename it into place.

    Raises:
        BadInput: something else is in the way.
    """
    assert settings.folder is not None  # the settings saw to it
    target = publishing.target_folder(settings)
    if problem := publishing.in_the_way(settings):
        raise BadInput(f"push.{problem}")
    partial, old = (target.absolute().with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    total = sum(record.size for record in files.values())
    done = 0
    try:
        for name, record in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(upload / name, partial / name)
            done += record.size
            ctx.progress(done, total, f"{words.size(done)} of {words.size(total)}")
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync(target.absolute().parent)
    finally:
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
    return Published(str(target))


# The Hub


def _to_hub(settings: PushSettings, upload: Path, files: dict[str, a.FileRecord], ctx: Context) -> Published:
    """Make the repo, upload, compare.

    Raises:
        BadInput: the Hub refuses, or has the repo as a public one.
        GateFailed: a file on the Hub differs.
    """
    assert settings.repo is not None  # the settings saw to it
    token = hub_token()
    if not token:
        raise BadInput(
            f"push.to=hub needs a token: set the environment variable HF_TOKEN to one with the role write from "
            f"{endpoint()}/settings/tokens"
        )
    set_verbosity(logging.INFO)  # a line every half a minute
    api = HfApi(token=token)
    repo_id = settings.repo
    with told(Repo("model", repo_id, "push.repo", "publish to a folder (push.to: folder)")):
        api.create_repo(repo_id, private=settings.private, exist_ok=True)
        if settings.private and not api.model_info(repo_id).private:
            raise BadInput(
                f"push.private: {repo_id} exists and is public. Make it private at {endpoint()}/{repo_id}/settings, choose "
                "another push.repo, or set push.private: false"
            )
        ctx.log(f"uploading {len(files)} files to {_repo_text(settings)}")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=upload, commit_message=settings.commit_message, delete_patterns=STALE
        ).oid
        there = {f.path: f for f in api.list_repo_tree(repo_id, recursive=True, revision=commit) if isinstance(f, RepoFile)}
    differing = [name for name, record in files.items() if not _same(there.get(name), record, upload / name)]
    if differing:
        raise GateFailed(
            f"after the upload {len(differing)} of {len(files)} files of {endpoint()}/{repo_id} are missing or differ from "
            f"those here: {listed(differing)}. Do not use commit {commit}; run again"
        )
    return Published(f"{endpoint()}/{repo_id}", commit)


def _same(there: RepoFile | None, record: a.FileRecord, here: Path) -> bool:
    """Whether a file of the Hub has the content of one here: by SHA-256 where it is a large file, else by git's hash."""
    if there is None or there.size != record.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == record.sha256)
    content = here.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


if __name__ == "__main__":
    runtime.main("push", run, __doc__)
