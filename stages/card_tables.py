"""The tables of a model card: every figure is one that a stage measured and recorded, every setting one that it was given."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.contracts import artifacts as a
from stages.contracts import figures, words
from stages.contracts.figures import Row

# Of a training's settings: how it told of itself and kept its state, which changes nothing of the model.
NOT_SHOWN = {
    "checkpoint_interval", "keep_checkpoints", "log_interval", "eval_interval", "eval_batches", "stop_after_minutes",
    "steps", "epochs", "tokens",
}  # fmt: skip
ONLY_ON_HUB = ("subset", "data_dir", "split")
MEAN_ERROR = "mean |Δlogit|"  # as a report of a comparison calls it
FINGERPRINT = 16  # characters of one that a reader is shown
BARS = 20  # characters of the longest bar


def table(head: Row, *rows: Row) -> list[str]:
    """A Markdown table, and an empty line."""
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells] + [""]


def details(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines that unfold."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def settings_rows(settings: Mapping[str, Any], leave_out: frozenset[str] | set[str] = frozenset()) -> list[Row]:
    """What was set, one row each. What has no value decides nothing."""
    return [(key, f"`{value}`") for key, value in settings.items() if key not in leave_out and value not in (None, [], {})]


def source_rows(data: a.RawDataArtifact) -> list[Row]:
    """Where the data come from: one row per source."""
    rows: list[Row] = []
    for each in data.sets:
        asked = _asked(data, each.key)
        keys = [*(ONLY_ON_HUB if each.revision is not None else ()), "format", "columns"]
        keys += ["text_column"] * (each.format == "text") + ["weight"] * (asked.get("weight", 1) != 1)
        shown = [f"{key} `{asked[key]}`" for key in keys if asked.get(key)]
        revision = f" at `{each.revision[:12]}`" if each.revision else ""
        rows.append((each.name, each.source + revision, each.role, words.size(each.text_bytes), ", ".join(shown)))
    return rows


def _asked(data: a.RawDataArtifact, key: str) -> Mapping[str, Any]:
    """What the configuration says of a source, by its key there: data, data.blend[1], data.valid[0]."""
    whole: Mapping[str, Any] = data.spec.get("data", {})
    if "[" not in key:
        return whole
    section, number = key.removeprefix("data.").rstrip("]").split("[")
    listed = whole.get(section, [])
    return listed[int(number)] if int(number) < len(listed) else {}


def dataset_rows(dataset: a.DatasetArtifact) -> list[Row]:
    """How many documents and tokens: one row per set."""
    return [
        (each.name, each.role, f"{each.documents:,}", f"{each.tokens:,}", f"{each.longest:,}", _left_out(each))
        for each in dataset.sets
    ]


def _left_out(each: a.DatasetSet) -> str:
    counts = {"empty": each.empty_documents, "malformed": each.malformed_lines, **each.left_out}
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)


def length_rows(dataset: a.DatasetArtifact) -> list[Row]:
    """Documents of all sets by their number of tokens, with a bar each."""
    rows = figures.length_rows(dataset)
    most = max((count for _, count in rows), default=1)
    return [(label, f"{count:,}", "█" * round(BARS * count / most) or "▏") for label, count in rows]


def model_rows(export: a.ExportArtifact, tokenizer: a.TokenizerFacts) -> list[Row]:
    """The architecture, in the words of config.json, and the tokenizer."""
    facts = export.model.model_dump(exclude={"parameters", "family"})
    added = ", ".join(f"`{token}` = {number}" for token, number in tokenizer.added_tokens.items())
    override: Mapping[str, str] = export.spec.get("settings", {}).get("override_special_tokens", {})
    others = ", ".join(f"{role} = `{token}`" for role, token in override.items())
    return [
        ("family", export.model.family),
        ("parameters", f"{export.model.parameters:,}"),
        *settings_rows(facts, leave_out={"added_tokens"}),
        ("tokenizer", f"{tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}"),
        *([("added tokens", added)] if added else []),
        *([("other special tokens", others)] if others else []),
    ]


def training_rows(checkpoint: a.CheckpointArtifact) -> list[Row]:
    """Length and layout."""
    settings: Mapping[str, Any] = checkpoint.spec["settings"]
    world = checkpoint.tp * checkpoint.pp * checkpoint.dp
    layout = f"dp {checkpoint.dp} × tp {checkpoint.tp} × pp {checkpoint.pp}"
    layout += f", {checkpoint.vpp} parts per pp rank" if checkpoint.vpp > 1 else ""
    epochs = checkpoint.metrics.get("length", {}).get("epochs")
    rows = [
        ("length", f"{checkpoint.step:,} steps, {checkpoint.consumed_tokens:,} tokens that count in the loss"),
        *([("passes over the data", f"{epochs:.3g}")] if epochs is not None else []),
        ("batch", f"{settings['global_batch_size']:,} samples of {settings['sequence_length']:,} tokens"),
        ("layout", f"{world} process{'es' if world > 1 else ''} = {layout}"),
    ]
    blend: Mapping[str, float] = checkpoint.spec.get("blend", {})
    return [*rows, *([("weights of the sets", f"`{dict(blend)}`")] if blend else [])]


def verification_rows(base: Mapping[str, Any], export: Mapping[str, Any]) -> list[Row]:
    """One row per comparison: of the base model on the data and on each probe, and of this model."""
    rows: list[Row] = []
    for what, report in (("base model", base), ("this model", export)):
        allowed = {gate.get("probe"): gate["allowed"] for gate in report.get("gates", []) if gate.get("name") == MEAN_ERROR}
        probes = [(probe.get("probe", "a probe"), probe) for probe in report.get("probes", [])]
        for name, found in [("the data", report), *probes]:
            limit = allowed.get(found.get("probe"))  # the data are no probe
            rows.append(
                (
                    f"{what}, {name}", figures.error(found.get("mean_error")), figures.error(found.get("max_error")),
                    "" if limit is None else f"{limit:g}", figures.error(found.get("loss_difference")),
                    figures.percent(found.get("argmax_agreement")), f"{found['tokens']:,}" if "tokens" in found else "",
                )
            )  # fmt: skip
    return rows


def circumstances(what: str, report: Mapping[str, Any]) -> str:
    """Under which a comparison was made, in a sentence; empty where the report does not say."""
    topology, tensors = report.get("topology"), report.get("tensors")
    parts = [f"in {report['precision']}"] if "precision" in report else []
    if topology:
        parts.append("on the ranks of " + " · ".join(f"{axis} {size}" for axis, size in topology.items()))
    if tensors:
        count, exact, rounded = tensors["tensors"], tensors["exact"], tensors.get("rounded")
        same = "all of them" if exact == count else f"{exact:,} of them"
        found = [f"{same} the source's bit for bit"] if exact or not rounded else []
        if rounded:
            found.append(f"{'all of them' if rounded == count else f'{rounded:,}'} the source's rounded to "
                         f"{' and '.join(tensors['dtypes'])}, as asked")  # fmt: skip
        parts.append(f"{count:,} tensors, {', '.join(found)}")
    return f"{what}: {', '.join(parts)}." if parts else ""


def module_rows(report: Mapping[str, Any]) -> list[Row]:
    """The differences after each module."""
    return [(f"`{module}`", *errors) for module, *errors in figures.module_rows(report)]


def version_rows(made: Mapping[str, a.Artifact]) -> list[Row]:
    """What these artifacts were made with. An image is told of a registry; one that was built here says nothing to readers."""
    rows = figures.versions_of(made.values())
    image = rows.pop("image", "")
    return [*rows.items(), *([("container image", f"`{image}`")] if "@" in image else [])]


def fingerprint_rows(base_model: str, made: Mapping[str, a.Artifact]) -> list[Row]:
    """Of the base model, and of everything that was made on the way from it."""
    prints = {"the base model": base_model, **{f"the {name}": artifact.fingerprint for name, artifact in made.items()}}
    return [(f"fingerprint of {name}", f"`{value[:FINGERPRINT]}`") for name, value in prints.items()]
