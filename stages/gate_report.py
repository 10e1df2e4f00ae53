"""What the gate tells: the report as JSON, the card as Markdown, and the message of a failure."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_core_impl.parity.explain import module_of
from megatron_core_impl.parity.figures import Comparison, Difference, layer_of
from stages.both_models import Precision
from stages.contracts import words
from stages.contracts.config import VerifySettings
from stages.contracts.figures import GATES, MODULES, Row, error, gate_rows, module_rows, percent
from stages.gate_rules import Evidence, Gate, first_difference, is_passed

# ── The report ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_of(evidence: Evidence, gates: tuple[Gate, ...], settings: VerifySettings, hint: str | None) -> dict[str, Any]:
    """Everything, as JSON values. What is not said of a probe is said of the data."""
    passed = is_passed(evidence, gates)
    first = None if passed else first_difference(evidence, evidence.accused(gates))
    layout, proof, data = evidence.layout, evidence.proof, evidence.data
    return {
        "passed": passed,
        "gates": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "topology": {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp},
        "precision": settings.precision,
        "batches": settings.batches,
        "batch_size": settings.batch_size,
        "sequence_length": settings.sequence_length,
        **_figures(evidence, data),
        "not_finite": next((c.not_finite for c in evidence.comparisons if c.not_finite is not None), None),
        "tensors": proof.report(),
        "config_differences": list(evidence.config_differences),
        "first_difference": None if first is None else first.module,
        "hint": hint,
        "probes": [
            {"probe": probe.name, **_figures(evidence, probe), "passed": _passes(probe, gates)}
            for probe in evidence.comparisons[1:]
        ],
        "modules": [asdict(difference) for difference in data.differences],
    }


def _figures(evidence: Evidence, comparison: Comparison) -> dict[str, Any]:
    rounding = evidence.rounding_of(comparison)
    return {
        "tokens": comparison.tokens,
        "mean_error": comparison.mean_error,
        "max_error": comparison.max_error,
        "loss_ours": comparison.loss_ours,
        "loss_transformers": comparison.loss_reference,
        "loss_difference": comparison.loss_difference,
        "argmax_agreement": comparison.argmax_agreement,
        "largest_relative_error": comparison.worst.relative,
        "largest_at": comparison.worst.module,
        **({} if rounding is None else {"transformers_rounding": rounding.worst.relative}),
    }


def _passes(comparison: Comparison, gates: Iterable[Gate]) -> bool:
    return comparison.not_finite is None and all(gate.passed for gate in gates if gate.probe == comparison.name)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that every parser reads: numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ── The card ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_of(title: str, evidence: Evidence, report: dict[str, Any], settings: VerifySettings) -> str:
    """The report for a reader, as Markdown.

    Args:
        title: what is compared with what.
        report: as `report_of` made it of the evidence.
    """
    layout, proof, data = evidence.layout, evidence.proof, evidence.data
    verdict = "passed" if report["passed"] else "**failed**"
    axes = " · ".join(f"{axis} {getattr(layout, axis)}" for axis in ("tp", "pp", "vpp"))
    in_bf16 = " Transformers' own is what it is off by in bf16 from itself in fp32." if evidence.rounding else ""
    rounded = f", {proof.rounded:,} rounded to {' and '.join(proof.dtypes)}" if proof.rounded else ""
    return "\n".join(
        [
            f"# {title}",
            "",
            f"Verdict: {verdict}. Topology: {axes}. Precision: ours {settings.precision}, transformers fp32. "
            f"{data.tokens:,} tokens of the data: {settings.batches} × {settings.batch_size} × {settings.sequence_length}.",
            "",
            f"Tensors: {proof.tensors:,} in {words.size(proof.bytes)}; {proof.exact:,} the source's bit for bit{rounded}, "
            f"{len(proof.differing) + len(proof.unexpected):,} different.",
            "",
            *_table(GATES, [(*row[:-1], row[-1].replace("failed", "**failed**")) for row in gate_rows(report)]),
            "## Logits and loss",
            "",
            "The loss is the mean cross-entropy of the next token, ours as training computes it.",
            "",
            *_table(
                ("", "tokens", "mean abs. Δlogit", "largest", "same best token", "loss of ours", "of transformers",
                 "largest relative error of a module"),
                [
                    (c.name, f"{c.tokens:,}", f"{c.mean_error:.1e}", f"{c.max_error:.1e}", percent(c.argmax_agreement),
                     f"{c.loss_ours:.6f}", f"{c.loss_reference:.6f}", f"{c.worst.relative:.1e} at {c.worst.module}")
                    for c in evidence.comparisons
                ],
            ),
            "## Hidden states of the data",
            "",
            f"Relative: root mean square of the difference over that of transformers'.{in_bf16}",
            "",
            *_table(*_with_rounding(module_rows(report), evidence.rounding_of(data))),
        ]
    )  # fmt: skip


def _with_rounding(rows: list[Row], rounding: Comparison | None) -> tuple[Row, list[Row]]:
    """The table of modules, beside each what transformers itself is off by there, where that was measured."""
    if rounding is None:
        return MODULES, rows
    own = [error(difference.relative) for difference in rounding.differences]
    return (*MODULES, "transformers' own"), [(*row, cell) for row, cell in zip(rows, own, strict=True)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, its first column to the left, the others to the right, and an empty line."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    cells = [escaped[0], ["---", *["---:"] * (len(header) - 1)], *escaped[1:]]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]


# ── Failure ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_failure(evidence: Evidence, gates: tuple[Gate, ...], precision: Precision) -> str:
    """What a person reads when the gate fails."""
    accused = evidence.accused(gates)
    if accused.not_finite is not None:
        side, module = accused.not_finite.split(": ")
        who = "our model" if side == "ours" else f"{side}' model"
        return (
            f"gate failed: {who} computes NaN or infinity, first at {module}. "
            f"The weights there are damaged, or the numbers too large for {precision if side == 'ours' else 'fp32'}"
        )
    failed = next(gate for gate in gates if not gate.passed)  # all of them are in the log
    first = first_difference(evidence, accused)
    if first is not None:
        size = f"mean |Δ| {first.mean:.2g} ({100 * first.relative:.3g} % of its size)"
        return (
            f"gate failed at {_place(first.module, first.output)}: {failed}\n"
            f"       First difference: {first.output}, {size}{_before(accused, first)}."
        )
    if differing := (*evidence.proof.differing, *evidence.proof.unexpected):
        module = module_of(differing[0])
        return (
            f"gate failed at {_place(module, module)}: {failed}\n       First of them: {differing[0]}. "
            "What is computed from it differs by no more than rounding does."
        )
    if evidence.config_differences:
        return f"gate failed: {failed}. What is computed differs by no more than rounding does."
    last = accused.differences[-1].relative
    return (
        f"gate failed: {failed}\n       No module stands out: the error grows evenly to {last:.1e} of the logits' size, "
        "as rounding makes it. If that is acceptable, allow more in the settings of verify."
    )


def _place(module: str, output: str) -> str:
    layer = layer_of(module)
    return f"layer {layer} ({module})" if layer is not None else f"the {output} ({module})"


def _before(comparison: Comparison, first: Difference) -> str:
    """How well everything before the first difference agrees."""
    if comparison.differences[0] is first:
        return ""
    agreement = comparison.agreement_before(first)
    to = f"to {agreement:.1e}" if agreement else "exactly"
    layers = {d.layer for d in comparison.differences[: comparison.differences.index(first)]} - {None, first.layer}
    if not layers:
        return f"; the embedding agrees {to}" if first.output == "attention output" else f"; all before it agrees {to}"
    return f"; layers 0-{len(layers) - 1} agree {to}" if len(layers) > 1 else f"; layer 0 agrees {to}"


def format_table(comparison: Comparison) -> str:
    """Errors of every module, for the log."""
    width = max(len(difference.module) for difference in comparison.differences)
    lines = [f"{'output of':{width}}   mean |Δ|    max |Δ|   relative   at pos. 0  second half"]
    for d in comparison.differences:
        lines.append(f"{d.module:{width}}  {d.mean:9.1e}  {d.max:9.1e}  {d.relative:9.1e}   {d.start:9.1e}    {d.late:9.1e}")
    return "\n".join(lines)
