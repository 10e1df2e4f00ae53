"""The model card: README.md of a published model, made from the artifacts of the run that made it.

What stands in it, in this order: how to use the model, its figures before and after training with the curve, the data and their
statistics, every setting, the proof of its computation, what it was made with, its licence. No path of this machine gets in:
what was read from this disk is called by its base name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_core_impl.metrics import perplexity
from stages import card_tables as tables
from stages.card_metadata import front_matter
from stages.card_tables import details, table
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.figures import EVALUATION, Row, evaluation_rows, filled
from stages.contracts.publishing import CHART
from stages.licence import Terms, licence_section

CHAT = (
    "",
    'messages = [{"role": "user", "content": "…"}]',
    'question = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
    "answer = model.generate(**question, max_new_tokens=200)[0, question.input_ids.shape[1] :]",
    "print(tokenizer.decode(answer, skip_special_tokens=True))",
)
TEXT = (
    "",
    'beginning = tokenizer("…", return_tensors="pt")',
    "print(tokenizer.decode(model.generate(**beginning, max_new_tokens=200)[0], skip_special_tokens=True))",
)


@dataclass(frozen=True)
class Lineage:
    """What a published model was made from, and how."""

    export: a.ExportArtifact
    checkpoint: a.CheckpointArtifact
    dataset: a.DatasetArtifact
    data: a.RawDataArtifact
    verification: a.VerificationArtifact
    base_report: Mapping[str, Any] = field(default_factory=dict)  # verification.json
    export_report: Mapping[str, Any] = field(default_factory=dict)  # the same comparison of what is published
    terms: Terms = field(default_factory=Terms)


def model_card(lineage: Lineage, name: str, *, revision: str | None = None, has_chart: bool = False) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        name: what `from_pretrained` is given, a repo or a folder.
        revision: its tag or branch, where it is not the main one.
        has_chart: there is a picture of the loss.
    """
    title = name.rstrip("/").rsplit("/", 1)[-1]
    export, data, checkpoint = lineage.export, lineage.data, lineage.checkpoint
    figures = {"loss": round(checkpoint.loss_after, 4), "perplexity": round(perplexity(checkpoint.loss_after), 4)}
    if (accuracy := checkpoint.metrics.get("accuracy_after")) is not None:
        figures["accuracy"] = accuracy
    chart = [f"![Loss while training, on held-out data, and the learning rate]({CHART})", ""] if has_chart else []
    return front_matter(title, export, data, figures, lineage.terms) + "\n".join(
        [
            "",
            f"# {title}",
            "",
            f"{words.short(export.model.parameters)} parameters, `{export.model.dtype}`, fine-tuned from {_base(export)} on "
            f"{data.source} with megatron-flows.",
            "",
            "## Use",
            "",
            *_use(name, revision, is_chat=lineage.dataset.content == "conversations"),
            "## Evaluation",
            "",
            "On held-out data of the same kind:",
            "",
            *_without_empty(EVALUATION, evaluation_rows(checkpoint, export)),
            *chart,
            "## Data",
            "",
            *_data(lineage),
            "## Training",
            "",
            *_training(lineage),
            "## Verification",
            "",
            *_verification(lineage),
            "## Made with",
            "",
            *table(("", ""), *_made_with(lineage)),
            "## Licence",
            "",
            *licence_section(export.license, lineage.terms),
            "",
        ]
    )


def _base(export: a.ExportArtifact) -> str:
    if export.source_revision is None:  # a folder, whose name says little
        return f"{export.source} (a local model, fingerprint `{export.inputs['model'][: tables.FINGERPRINT]}`)"
    return f"[{export.source}](https://huggingface.co/{export.source}) at `{export.source_revision[:12]}`"


def _use(name: str, revision: str | None, *, is_chat: bool) -> list[str]:
    given = json.dumps(name, ensure_ascii=False) + (f", revision={json.dumps(revision)}" if revision else "")
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({given})",
        f"tokenizer = AutoTokenizer.from_pretrained({given})",
        *(CHAT if is_chat else TEXT),
        "```",
        "",
    ]


def _data(lineage: Lineage) -> list[str]:
    data, dataset = lineage.data, lineage.dataset
    totals = [
        ("documents", f"{dataset.documents:,}, {words.size(data.text_bytes)} of {a.units(data.sets)}"),
        ("tokens", f"{dataset.tokens:,}"),
        ("longest document", f"{max((each.longest for each in dataset.sets), default=0):,} tokens"),
        ("tokenizer", f"{dataset.tokenizer.kind}, vocabulary {dataset.tokenizer.vocab_size:,}"),
        _marks(dataset),
    ]
    settings: Mapping[str, Any] = dataset.spec.get("settings", {})
    lengths = tables.length_rows(dataset)
    return [
        *table(("", ""), *totals),
        *_without_empty(("source", "from", "for", "size", "settings"), tables.source_rows(data)),
        *_without_empty(("set", "for", "documents", "tokens", "longest", "left out"), tables.dataset_rows(dataset)),
        *(details("Documents by length", table(("tokens", "documents", ""), *lengths)) if lengths else []),
        *details("Preprocessing", table(("", ""), *tables.settings_rows(settings, leave_out={"workers"}))),
    ]


def _marks(dataset: a.DatasetArtifact) -> tuple[str, str]:
    """What stands around a document, or a message."""
    if dataset.content == "conversations":
        template = dataset.spec["settings"]["chat_template"]
        return "chat template", {"tokenizer": "that of the base model's tokenizer", "chatml": "ChatML"}.get(template, template)
    return "end of a document", "marked by the end-of-text token" if dataset.bos_eos != "none" else "not marked"


def _training(lineage: Lineage) -> list[str]:
    settings: Mapping[str, Any] = lineage.checkpoint.spec.get("settings", {})
    return [
        *table(("", ""), *tables.training_rows(lineage.checkpoint)),
        *details("All settings", table(("", ""), *tables.settings_rows(settings, leave_out=tables.NOT_SHOWN))),
        *details("The model", table(("", ""), *tables.model_rows(lineage.export, lineage.dataset.tokenizer))),
    ]


def _verification(lineage: Lineage) -> list[str]:
    """Rows of the reports; without reports what the artifacts themselves say."""
    base, export = lineage.verification, lineage.export
    in_artifact = base.model_dump() | {"gates": [{"name": tables.MEAN_ERROR, "allowed": base.allowed_mean_error}]}
    reports = lineage.base_report or in_artifact, lineage.export_report or {"mean_error": export.mean_error}
    head = ("", "mean difference", "largest", "allowed mean", "of the loss", "same best token", "tokens")
    layers = tables.module_rows(lineage.base_report), tables.module_rows(lineage.export_report)
    points = ("after", "mean difference", "largest", "relative")
    told = " ".join(
        filter(None, (tables.circumstances(*each) for each in zip(("Base model", "This model"), reports, strict=True)))
    )
    return [
        "Logits of the model that was trained against those of `transformers`, on the same tokens of the data: of the base "
        "model before training, and of this one as it is published. The run ends where they differ by more than is allowed.",
        "",
        *([told, ""] if told else []),
        *_without_empty(head, tables.verification_rows(*reports)),
        *(details("Base model, layer by layer", table(points, *layers[0])) if layers[0] else []),
        *(details("This model, layer by layer", table(points, *layers[1])) if layers[1] else []),
    ]


def _made_with(lineage: Lineage) -> list[Row]:
    made = {
        "data": lineage.data, "dataset": lineage.dataset, "verification": lineage.verification,
        "checkpoint": lineage.checkpoint, "export": lineage.export,
    }  # fmt: skip
    base_model = lineage.export.inputs["model"]
    return [*tables.version_rows(made), *tables.fingerprint_rows(base_model, made)]


def _without_empty(head: Row, rows: list[Row]) -> list[str]:
    """A table without the columns that have nothing in them."""
    shown, cells = filled(head, rows)
    return table(shown, *cells) if rows else []
