"""Publish the exported model with a model card: to the Hugging Face Hub, to a folder, or nowhere (a dry run).

The card, README.md, is made from the artifacts of the run; assets/loss.png is its curve. On the Hub the repo is private unless
asked otherwise, all files appear in one commit, and every file's digest there is compared with the one here; an upload that is
interrupted goes on where it was (see hub_upload). The token is read from the environment variable HF_TOKEN; HF_ENDPOINT names
another Hub. A folder is replaced as a whole, and only if it is empty or an earlier push made it.

The result holds the card, what it shows, and receipt.json, which names every file that was, or would be, published, with size
and SHA-256.
"""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.digests import file_sha256
from megatron_core_impl.checkpoint.durable import sync
from megatron_core_impl.json_files import read_json
from megatron_core_impl.metrics import METRICS_FILE, read_metrics
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import intact, publishing, words
from stages.contracts.config import PushSettings
from stages.contracts.publishing import CARD, CHART
from stages.contracts.specs import PushSpec
from stages.hub_errors import address
from stages.hub_upload import Published, to_hub
from stages.licence import NOTICE, Terms, read_terms
from stages.loss_chart import draw_losses
from stages.model_card import Lineage, model_card
from stages.model_files import copy_file
from stages.outcomes import BadInput

Sources = dict[str, Path]  # what is published: its name there -> the file here
Records = dict[str, a.PublishedFile]


def run(spec: PushSpec, ctx: Context) -> a.PushArtifact:
    """Make the card and publish.

    Raises:
        BadInput: the target may not be written; the message says what to do.
        GateFailed: what the Hub has after the upload is not what lies here.
    """
    export, folder = ctx.input("export", a.ExportArtifact)
    verification, verified = ctx.input("verification", a.VerificationArtifact)
    checkpoint = ctx.facts("checkpoint", a.CheckpointArtifact)
    dataset, data = ctx.facts("dataset", a.DatasetArtifact), ctx.facts("data", a.RawDataArtifact)

    settings = spec.settings
    names = [name.removeprefix("model/") for name in export.files if name.startswith("model/")]
    if not any(name.endswith(".safetensors") for name in names):
        raise BadInput(f"inputs.export: {folder / 'model'} holds no weights")
    sources = {name: folder / "model" / name for name in names if name != CARD}

    terms = _terms(sources, settings, ctx)
    if terms.notice is not None and NOTICE not in sources and (ctx.scratch / NOTICE).exists():
        sources[NOTICE] = ctx.scratch / NOTICE
    has_chart = draw_losses(_curve(ctx, checkpoint), ctx.scratch / CHART)
    if has_chart:
        sources[CHART] = ctx.scratch / CHART
    lineage = Lineage(
        export, checkpoint, dataset, data, verification, _report(verified / "verification.json"),
        _report(folder / "comparison.json"), terms,
    )  # fmt: skip
    revision = None if settings.to == "folder" else settings.tag or (settings.branch if settings.branch != "main" else None)
    (ctx.scratch / CARD).write_text(model_card(lineage, _name(settings), revision=revision, has_chart=has_chart))
    sources[CARD] = ctx.scratch / CARD
    records = _records(sources)

    published = {"dry-run": _list, "folder": _to_folder, "hub": to_hub}[settings.to](settings, sources, records, ctx)
    on_hub = settings.to == "hub"
    receipt = {
        "to": settings.to, "target": published.target, "branch": settings.branch if on_hub else None,
        "tag": settings.tag if on_hub else None, "commit": published.commit,
        "files": {name: record.model_dump() for name, record in sorted(records.items())},
    }  # fmt: skip
    (ctx.scratch / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n")
    return ctx.artifact(
        a.PushArtifact,
        figure=_figure(settings, published, records),
        to=settings.to,
        target=published.target,
        commit=published.commit,
        branch=settings.branch if on_hub else None,
        tag=settings.tag if on_hub else None,
        published=records,
    )


def _name(settings: PushSettings) -> str:
    """What the card calls the model: where its readers find it. Where it lies on this machine is nobody's business."""
    if settings.repo:
        return settings.repo
    return f"path/to/{publishing.target_folder(settings).resolve().name if settings.folder else 'model'}"


def _records(sources: Sources) -> Records:
    """Size and SHA-256 of every file."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_sha256, sources.values())
    return {
        name: a.PublishedFile(size=path.stat().st_size, sha256=digest)
        for (name, path), digest in zip(sources.items(), digests, strict=True)
    }


def _terms(sources: Sources, settings: PushSettings, ctx: Context) -> Terms:
    """The licence's terms. A notice that it asks for, and that did not come with the base model, is written."""
    terms = read_terms(sources)
    if terms.notice is not None and not terms.has_notice:
        (ctx.scratch / NOTICE).write_text(terms.notice + "\n")
        terms = replace(terms, files=(*terms.files, NOTICE))
    title = (settings.repo or "").rsplit("/", 1)[-1]
    if settings.repo and terms.name and not _letters(title).startswith(_letters(terms.name)):
        ctx.warn(
            f"{terms.source} of the base model asks for “{terms.name}” at the beginning of the name of a model made from it, "
            f"and push.repo is {settings.repo}"
        )
    return terms


def _curve(ctx: Context, checkpoint: a.CheckpointArtifact) -> list[dict[str, Any]]:
    """What training wrote on its way. Of all that the checkpoint's folder holds it is the only file that push reads."""
    folder = ctx.workspace / ctx.spec.inputs["checkpoint"].path
    if METRICS_FILE in checkpoint.files:
        try:
            intact.check_size(folder, checkpoint, METRICS_FILE)
            intact.check_content(folder, checkpoint, METRICS_FILE)
        except a.DamagedArtifact as error:
            raise BadInput(f"inputs.checkpoint: {error}") from None
    return read_metrics(folder)


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _report(file: Path) -> Mapping[str, Any]:
    """The figures of a comparison, none where it left no such file."""
    return read_json(file) if file.exists() else {}


def _figure(settings: PushSettings, published: Published, records: Records) -> str:
    what = f"{len(records)} files, {words.size(sum(record.size for record in records.values()))}"
    if settings.to == "dry-run":
        return f"dry run: would upload {what} to {_repo_text(settings)}"
    if settings.to == "hub":
        tag = f", tag {settings.tag}" if settings.tag else ""
        return f"{what} at {published.target}{tag} ({'private' if published.private else 'public'}), digests equal"
    return f"{what} in {published.target}"


def _repo_text(settings: PushSettings) -> str:
    return f"{'a private' if settings.private else 'a public'} repo{f' {settings.repo}' if settings.repo else ''}"


def _list(settings: PushSettings, sources: Sources, records: Records, ctx: Context) -> Published:
    """Say what would be uploaded."""
    tag = f", tagged {settings.tag}" if settings.tag else ""
    ctx.log(f"would upload to {_repo_text(settings)}, branch {settings.branch}{tag}, as “{settings.commit_message}”:")
    for name, record in sorted(records.items()):
        ctx.log(f"  {words.size(record.size):>12}  {name}")
    ctx.log(f"the model card: {ctx.spec.folder / CARD}")
    return Published(f"{address()}/{settings.repo}" if settings.repo else "")


def _to_folder(settings: PushSettings, sources: Sources, records: Records, ctx: Context) -> Published:
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
    total = sum(record.size for record in records.values())
    done = 0
    try:
        for name, source in sources.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, partial / name)
            done += records[name].size
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


if __name__ == "__main__":
    runtime.main("push", run, __doc__)
