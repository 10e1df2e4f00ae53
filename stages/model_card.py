"""The model card: README.md of a published model, made from the artifacts of the run that made it.

Every figure is one that a stage measured and recorded. No path of this machine gets in: what was read from this disk is
called by its base name.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.publishing import TAG

CHAT = (
    "",
    'messages = [{"role": "user", "content": "…"}]',
    'question = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
    "answer = model.generate(**question, max_new_tokens=200)[0, question.input_ids.shape[1] :]",
    "print(tokenizer.decode(answer, skip_special_tokens=True))",
)
NOT_SHOWN = {"checkpoint_interval", "keep_checkpoints", "log_interval", "eval_interval", "eval_batches"}


@dataclass(frozen=True)
class Lineage:
    """What a published model was made from, and how."""

    export: a.ExportArtifact
    checkpoint: a.CheckpointArtifact
    dataset: a.DatasetArtifact
    data: a.RawDataArtifact
    verification: a.VerificationArtifact


def model_card(lineage: Lineage, name: str) -> str:
    """The card as Markdown with YAML front matter. `name` is what `from_pretrained` is given, a repo or a folder."""
    export = lineage.export
    base = export.source + (f" at `{export.source_revision[:12]}`" if export.source_revision else "")
    title = name.rstrip("/").rsplit("/", 1)[-1]
    return "\n".join(
        [
            *_front_matter(lineage),
            f"# {title}",
            "",
            f"{words.short(export.model.parameters)} parameters, `{export.model.dtype}`, fine-tuned from {base} on "
            f"{lineage.data.source} with megatron-flows.",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name, ensure_ascii=False)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name, ensure_ascii=False)})",
            *(CHAT if lineage.dataset.content == "conversations" else ()),
            "```",
            "",
            "## Result",
            "",
            "On held-out data of the same kind:",
            "",
            *_table(("", "before", "after"), *_results(lineage)),
            "## Data",
            "",
            *_table(("", ""), *_data_rows(lineage)),
            "## Training",
            "",
            *_table(("", ""), *_training_rows(lineage.checkpoint)),
            "## Verification",
            "",
            "Logits of this project's model against those of `transformers`, on the same tokens of the data:",
            "",
            *_table(("", "mean difference", "largest", "allowed mean", "same best token"), *_verification_rows(lineage)),
            "## Made with",
            "",
            *_table(("", ""), *_version_rows(lineage)),
            "## Licence",
            "",
            f"That of the base model: {export.license}."
            if export.license
            else "The base model names none; its terms apply, whatever they are.",
            "",
        ]
    )


def _front_matter(lineage: Lineage) -> list[str]:
    """What the Hub reads. A JSON string is a YAML string."""
    export, data = lineage.export, lineage.data
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if (other := re.fullmatch(r"other \((.+)\)", export.license or "")) is not None:
        lines += ["license: other", f"license_name: {_yaml(other[1])}"]
    elif export.license:
        several = export.license.split(", ")
        lines += (
            ["license:", *(f"- {_yaml(one)}" for one in several)] if len(several) > 1 else [f"license: {_yaml(several[0])}"]
        )
    if export.source_revision is not None:  # only a name on the Hub may stand here
        lines += [f"base_model: {_yaml(export.source)}", "base_model_relation: finetune"]
    if data.revision is not None:
        lines += ["datasets:", f"- {_yaml(data.source)}"]
    return [*lines, "tags:", f"- {TAG}", f"- {export.model.family}", "---", ""]


def _results(lineage: Lineage) -> list[tuple[str, ...]]:
    before, after = lineage.checkpoint.loss_before, lineage.checkpoint.loss_after
    rows: list[tuple[str, ...]] = [
        ("loss", f"{before:.4f}", f"{after:.4f}"),
        ("perplexity", _perplexity(before), _perplexity(after)),
    ]
    if right := lineage.export.metrics.get("answers"):
        shares = (f"{100 * right[when]:.2f} %" for when in ("before", "after"))
        rows.append((f"right answers to {right['questions']:,} questions", *shares))
    return rows


def _data_rows(lineage: Lineage) -> list[tuple[str, ...]]:
    data, dataset = lineage.data, lineage.dataset
    asked: dict[str, Any] = data.spec.get("data", {})
    on_hub = data.revision is not None
    shown = ("subset", "data_dir", "split", "text_column") if on_hub else ("text_column",)
    settings = ", ".join(f"{key} `{asked[key]}`" for key in shown if asked.get(key))
    rows = [("source", data.source + (f" at `{data.revision[:12]}`" if data.revision else ""))]
    if on_hub and settings:
        rows.append(("part", settings))
    return [
        *rows,
        ("documents", f"{dataset.documents:,}, {words.size(data.text_bytes)} of {a.units(data.sets)}"),
        ("tokens", f"{dataset.tokens:,}"),
        ("tokenizer", f"{dataset.tokenizer.kind}, vocabulary {dataset.tokenizer.vocab_size:,}"),
        _marks(dataset),
    ]


def _marks(dataset: a.DatasetArtifact) -> tuple[str, str]:
    """What stands around a document, or a message."""
    if dataset.content == "conversations":
        template = dataset.spec["settings"]["chat_template"]
        return "chat template", {"tokenizer": "that of the base model's tokenizer", "chatml": "ChatML"}.get(template, template)
    return "end of a document", "marked by the end-of-text token" if dataset.bos_eos != "none" else "not marked"


def _training_rows(checkpoint: a.CheckpointArtifact) -> list[tuple[str, ...]]:
    settings: dict[str, Any] = checkpoint.spec.get("settings", {})
    world = checkpoint.tp * checkpoint.pp * checkpoint.dp
    processes = f"{world} process{'es' if world > 1 else ''}"
    return [
        ("length", f"{checkpoint.step:,} steps, {checkpoint.consumed_tokens:,} tokens that count in the loss"),
        (
            "layout",
            f"{processes} = dp {checkpoint.dp} × tp {checkpoint.tp} × pp {checkpoint.pp}",
        ),
        *(
            (key, f"{value}")
            for key, value in settings.items()
            if key not in NOT_SHOWN | {"steps", "epochs", "tokens"} and value is not None
        ),
    ]


def _verification_rows(lineage: Lineage) -> list[tuple[str, ...]]:
    base, export = lineage.verification, lineage.export
    first = (
        f"base model, {base.precision}", f"{base.mean_error:.1e}", f"{base.max_error:.1e}", f"{base.allowed_mean_error:g}",
        f"{100 * base.argmax_agreement:.2f} %",
    )  # fmt: skip
    return [first, ("this model", f"{export.mean_error:.1e}", "", "", "")]


def _version_rows(lineage: Lineage) -> list[tuple[str, ...]]:
    versions = lineage.checkpoint.versions
    rows = [("megatron-flows", versions.package), ("python", versions.python), ("torch", versions.torch or "")]
    if versions.image:
        rows.append(("container image", f"`{versions.image}`"))
    made = ("export", lineage.export), ("checkpoint", lineage.checkpoint), ("dataset", lineage.dataset)
    return [*rows, *((f"fingerprint of {name}", f"`{artifact.fingerprint[:16]}`") for name, artifact in made)]


def _table(head: tuple[str, ...], *rows: tuple[str, ...]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _yaml(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
