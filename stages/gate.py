"""The gate that verify and export share: our model against transformers' on the same real tokens, and a verdict.

Both models are loaded fresh, in the same precision, and run on the first samples of the tokenized data. The figures are those
of `megatron_core_impl.parity`; what is allowed comes from the settings. A gate that fails names the first module whose output
differs, and what may have happened to it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_core_impl import parity
from megatron_core_impl.checkpoint.index import read_json
from megatron_core_impl.data.gpt_dataset import GPTDataset
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.streams import TEXT
from megatron_core_impl.models import families
from stages.both_models import Precision, load_ours, load_transformers
from stages.contracts import artifacts as a
from stages.contracts.config import VerifySettings
from stages.runtime import BadInput, Context, GateFailed

MEAN_ERROR = {"fp32": 1e-4, "bf16": 5e-2}
LOSS_DIFFERENCE = {"fp32": 1e-4, "bf16": 5e-2}
ARGMAX_AGREEMENT = {"fp32": 0.999, "bf16": 0.9}
# Relative error at any module. Rounding stays below 1e-5 in fp32, while a fault makes 1e-3 and more, even one that hardly
# moves the logits: attention of an untrained model is so even that nearly nothing depends on a wrong RoPE. In bf16 rounding
# itself reaches 1e-1, so there is no such gate; and none where a person chose what passes.
MODULE_ERROR = 1e-3
FLOOR = {"fp32": 1e-5, "bf16": 3e-2}  # relative errors below this are rounding, when the first difference is looked for
SEED = 1234  # of the order of samples


@dataclass(frozen=True)
class Gate:
    """One figure and what is allowed for it."""

    name: str  # as messages call it
    value: float
    allowed: float
    at_least: bool = False  # `allowed` is the smallest that passes, not the largest

    @property
    def passed(self) -> bool:
        return self.value >= self.allowed if self.at_least else self.value <= self.allowed  # NaN passes neither

    def __str__(self) -> str:
        if self.at_least:
            return f"{self.name} {percent(self.value)}, needed {percent(self.allowed)}"
        return f"{self.name} {self.value:.2g}, allowed {short(self.allowed)}"


@dataclass(frozen=True)
class Verdict:
    """A comparison that passed, and the gates it passed."""

    comparison: parity.Comparison
    gates: tuple[Gate, ...]
    report: dict[str, Any]  # JSON values

    @property
    def figure(self) -> str:
        mean = self.gates[0]
        agreement = percent(self.comparison.argmax_agreement)
        return f"mean |Δlogit| {mean.value:.1e} · argmax {agreement} · gate {short(mean.allowed)}"

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures for reports: everything but the modules."""
        return {key: value for key, value in self.report.items() if key not in ("modules", "first_difference", "hint")}


def check_model(ours: a.ModelFacts, source: a.ModelFacts, *, also: tuple[str, ...] = (), has_grown: bool = True) -> None:
    """Refuse weights that are not of this model's shape.

    Args:
        also: further facts that must be the same.
        has_grown: the weights may have further rows, for added tokens.

    Raises:
        BadInput: naming the field and both values.
    """
    for field in ("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "norm", "is_gated", "qkv_bias", "o_bias", "mlp_bias", "is_parallel",
                  "has_shared_norm", "tie_word_embeddings", *also):  # fmt: skip
        mine, other = getattr(ours, field), getattr(source, field)
        if mine != other and not (has_grown and field == "vocab_size" and mine > other):
            name = families.FAMILIES[source.family].hf_fields.get(field, field)  # as config.json says it
            raise BadInput(
                f"inputs: {name}={mine} of the weights is not {name}={other} of the model: they do not belong together; "
                "take weights that were converted from this model"
            )


def check_tokenizer(dataset: a.DatasetArtifact, model: a.ModelFacts) -> None:
    """Refuse data with token ids that the model has no embedding for.

    Raises:
        BadInput: naming the fields and both values.
    """
    if dataset.tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"inputs.dataset: tokenizer.vocab_size={dataset.tokenizer.vocab_size} of the data exceeds "
            f"vocab_size={model.vocab_size} of the model, which has no embedding for the ids above. "
            "Preprocess with the tokenizer that belongs to this model"
        )


def check_gate(
    ctx: Context,
    settings: VerifySettings,
    *,
    model: a.ModelFacts,
    weights: Path,
    reference: Path,
    dataset: a.DatasetArtifact,
    data: Path,
) -> Verdict:
    """Compare our model, from a folder of weights, with transformers', from a Hugging Face folder, and judge.

    Args:
        model: what our model is built from.
        weights: folder of canonical weights.
        reference: folder that transformers loads.
        dataset: the data whose tokens both models see.
        data: folder of the dataset.

    Raises:
        BadInput: the data or the weights do not fit the model.
        GateFailed: the models differ by more than the settings allow. The table of differences is in the log, the whole
            report in a file beside the stage's results.
    """
    check_tokenizer(dataset, model)
    batches = _read_batches(settings, model, dataset, data)
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers switch TF32 on, which is no fp32
    ctx.log(f"loading both models in {settings.precision}")
    ours = load_ours(model, weights, settings.precision)
    theirs = load_transformers(reference, settings.precision, vocab_size=model.vocab_size)
    comparison = parity.compare(ours, theirs, _with_progress(ctx, batches))
    gates = _judge(comparison, settings)
    report = _report(comparison, gates, settings, ours, theirs)
    report["config_differences"] = _config_differences(model, reference)
    report_file = ctx.scratch.parent / f".{ctx.spec.key}.failed.json"  # the scratch folder does not survive a failure
    if comparison.not_finite is None and all(gate.passed for gate in gates):
        report_file.unlink(missing_ok=True)
        return Verdict(comparison, gates, report)
    ctx.log(format_table(comparison))
    ctx.log("\n".join(f"{'passed' if gate.passed else 'FAILED'}  {gate}" for gate in gates))
    write_json(report_file, report)
    message = [_describe_failure(comparison, gates, settings.precision)]
    message += [cause for cause in (report["hint"], *report["config_differences"]) if cause]
    raise GateFailed("\n       ".join([*message, f"Report: the table in the log, and {report_file}"]))


def _read_batches(
    settings: VerifySettings, model: a.ModelFacts, dataset: a.DatasetArtifact, data: Path
) -> list[parity.Batch]:  # fmt: skip
    """Real tokens: the first samples of the first set in an order of their own, always the same ones."""
    length = settings.sequence_length
    if length > model.max_position_embeddings:
        raise BadInput(
            f"verify.sequence_length={length} exceeds max_position_embeddings={model.max_position_embeddings} of the model; "
            f"set it to {model.max_position_embeddings} or less"
        )
    try:
        name = dataset.sets[0].name
        tokens = IndexedDataset(data / (name if dataset.content == "text" else f"{name}{TEXT}"))
        count = settings.batches * settings.batch_size
        samples = GPTDataset(tokens, range(len(tokens)), sequence_length=length, num_samples=count, seed=SEED)
    except ValueError as error:
        raise BadInput(f"inputs.dataset: {error} (verify.sequence_length={length})") from error
    batches = []
    for first in range(0, count, settings.batch_size):
        batch = torch.stack([torch.from_numpy(samples[k]) for k in range(first, first + settings.batch_size)])  # [B, S + 1]
        if int(batch.max()) >= model.vocab_size:
            raise BadInput(f"inputs.dataset: holds token id {int(batch.max())}, but vocab_size={model.vocab_size} of the model")
        batches.append((batch[:, :-1], batch[:, 1:]))
    return batches


def _with_progress(ctx: Context, batches: list[parity.Batch]) -> Iterator[parity.Batch]:
    for number, batch in enumerate(batches):
        ctx.progress(number, len(batches), f"comparing batch {number + 1} of {len(batches)}")
        yield batch


# ── Verdict ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge(comparison: parity.Comparison, settings: VerifySettings) -> tuple[Gate, ...]:
    """The gates of a comparison, the mean error first."""
    precision = settings.precision
    agreement = settings.min_argmax_agreement
    gates = [
        Gate("mean |Δlogit|", comparison.mean_error, settings.max_mean_error or MEAN_ERROR[precision]),
        Gate("|Δloss|", comparison.loss_difference, settings.max_loss_difference or LOSS_DIFFERENCE[precision]),
        Gate("argmax agreement", comparison.argmax_agreement,
             ARGMAX_AGREEMENT[precision] if agreement is None else agreement, at_least=True),
    ]  # fmt: skip
    if precision == "fp32" and settings.max_mean_error is None:
        largest = max(difference.relative for difference in comparison.differences)
        gates.append(Gate("largest relative error of a module", largest, MODULE_ERROR))
    return tuple(gates)


def _config_differences(model: a.ModelFacts, reference: Path) -> list[str]:
    """The fields in which our model is built otherwise than config.json says, one sentence each."""
    described = families.config_from_hf(read_json(reference / "config.json"))
    in_file = families.family_of(described).hf_fields
    return [
        f"Our model is built with {in_file.get(field, field)}={value}, config.json says {getattr(described, field)}."
        for field, value in model.config_fields().items()
        if getattr(described, field) != value and not (field == "vocab_size" and value > described.vocab_size)
    ]


def _describe_failure(comparison: parity.Comparison, gates: tuple[Gate, ...], precision: Precision) -> str:
    """What a person reads when the gate fails."""
    if comparison.not_finite is not None:
        side, module = comparison.not_finite.split(": ")
        who = "our model" if side == "ours" else f"{side}' model"
        return (
            f"gate failed: {who} computes NaN or infinity, first at {module}. "
            f"The weights there are damaged, or the numbers too large for {precision}"
        )
    failed = next(gate for gate in gates if not gate.passed)  # all of them are in the log
    first = comparison.first_difference(FLOOR[precision])
    if first is None:
        last = comparison.differences[-1].relative
        return (
            f"gate failed: {failed}\n       No module stands out: the error grows evenly to {last:.1e} of the logits' size, "
            "as rounding makes it. If that is acceptable, allow more in the settings of verify."
        )
    place = f"layer {first.layer}" if first.layer is not None else f"the {first.output}"
    size = f"mean |Δ| {first.mean:.2g} ({100 * first.relative:.3g} % of its size)"
    return (
        f"gate failed at {place} ({first.module}): {failed}\n"
        f"       First difference: {first.output}, {size}{_before(comparison, first)}."
    )


def _before(comparison: parity.Comparison, first: parity.Difference) -> str:
    """How well everything before the first difference agrees."""
    if comparison.differences[0] is first:
        return ""
    agreement = comparison.agreement_before(first)
    to = f"to {agreement:.1e}" if agreement else "exactly"
    layers = {d.layer for d in comparison.differences[: comparison.differences.index(first)]} - {None, first.layer}
    if not layers:
        return f"; the embedding agrees {to}" if first.output == "attention output" else f"; all before it agrees {to}"
    return f"; layers 0-{len(layers) - 1} agree {to}" if len(layers) > 1 else f"; layer 0 agrees {to}"


def _report(
    comparison: parity.Comparison, gates: tuple[Gate, ...], settings: VerifySettings, ours: parity.Side, theirs: parity.Side
) -> dict[str, Any]:
    """Everything, as JSON values."""
    passed = comparison.not_finite is None and all(gate.passed for gate in gates)
    first = None if passed else comparison.first_difference(FLOOR[settings.precision])
    return {
        "passed": passed,
        "gates": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "precision": settings.precision,
        "batches": settings.batches,
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
        "tokens": comparison.tokens,
        "mean_error": comparison.mean_error,
        "max_error": comparison.max_error,
        "loss_ours": comparison.loss_ours,
        "loss_transformers": comparison.loss_reference,
        "loss_difference": comparison.loss_difference,
        "argmax_agreement": comparison.argmax_agreement,
        "not_finite": comparison.not_finite,
        "first_difference": None if first is None else first.module,
        "hint": None if first is None else parity.explain(first, ours, theirs),
        "modules": [asdict(difference) for difference in comparison.differences],
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON that every parser reads: numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def format_table(comparison: parity.Comparison) -> str:
    """Errors of every module, for the log."""
    width = max(len(difference.module) for difference in comparison.differences)
    lines = [f"{'output of':{width}}   mean |Δ|    max |Δ|   relative   at pos. 0  second half"]
    for d in comparison.differences:
        lines.append(f"{d.module:{width}}  {d.mean:9.1e}  {d.max:9.1e}  {d.relative:9.1e}   {d.start:9.1e}    {d.late:9.1e}")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as a person reads it; never rounded up to 100 %."""
    return f"{math.floor(share * 10000) / 100:g} %" if math.isfinite(share) else "none"


def short(value: float) -> str:
    """A tolerance in as few digits as it needs, e.g. 1e-04."""
    text = f"{value:.0e}"
    return text if float(text) == value else f"{value:g}"
