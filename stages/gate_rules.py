"""What passes the gate: the figures of a comparison, what is allowed for each, and where a failure begins."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_core_impl.config import Layout
from megatron_core_impl.parity.figures import Comparison, Difference
from megatron_core_impl.parity.tensors import TensorProof
from stages.contracts.config import VerifySettings
from stages.contracts.figures import percent, tolerance

MEAN_ERROR = {"fp32": 1e-4, "bf16": 5e-2}
LOSS_DIFFERENCE = {"fp32": 1e-4, "bf16": 5e-2}
ARGMAX_AGREEMENT = {"fp32": 0.999, "bf16": 0.9}
# Relative error at any module. Rounding stays below 1e-5 in fp32, while a fault makes 1e-3 and more, even one that hardly
# moves the logits: attention of an untrained model is so even that nearly nothing depends on a wrong RoPE. In bf16 rounding
# itself reaches 1e-1, more in some models than a fault makes in others; there it is measured: what transformers is off by in
# bf16, at the same module, from itself in fp32. None of this where a person chose what passes.
MODULE_ERROR = 1e-3
ROUNDING = 3.0
FLOOR = 1e-5  # relative errors below this are rounding in fp32, when the first difference is looked for


@dataclass(frozen=True)
class Gate:
    """One figure and what is allowed for it."""

    name: str  # as messages call it
    value: float
    allowed: float
    at_least: bool = False  # `allowed` is the smallest that passes, not the largest
    probe: str | None = None  # that it is a figure of; None: of the data, or of all

    @property
    def passed(self) -> bool:
        return self.value >= self.allowed if self.at_least else self.value <= self.allowed  # NaN passes neither

    def __str__(self) -> str:
        name = self.name if self.probe is None else f'{self.name} of the probe "{self.probe}"'
        if self.at_least:
            return f"{name} {percent(self.value)}, needed {percent(self.allowed)}"
        return f"{name} {self.value:.2g}, allowed {tolerance(self.allowed)}"


@dataclass(frozen=True)
class Evidence:
    """All that a verdict is made of."""

    layout: Layout  # that ours ran on
    proof: TensorProof
    config_differences: tuple[str, ...]
    comparisons: tuple[Comparison, ...]  # of the data, then of each probe
    rounding: tuple[Comparison, ...] | None  # the same of transformers in half precision, where ours computes in it

    @property
    def data(self) -> Comparison:
        return self.comparisons[0]

    def rounding_of(self, comparison: Comparison) -> Comparison | None:
        """What transformers itself is off by."""
        return None if self.rounding is None else self.rounding[self.comparisons.index(comparison)]

    def accused(self, gates: tuple[Gate, ...]) -> Comparison:
        """The comparison to look at after a failure: the first that has NaN or infinity, else that of the first failed gate."""
        if broken := [comparison for comparison in self.comparisons if comparison.not_finite is not None]:
            return broken[0]
        probe = next((gate.probe for gate in gates if not gate.passed), None)
        return next((comparison for comparison in self.comparisons if comparison.name == probe), self.data)


def judge(evidence: Evidence, settings: VerifySettings) -> tuple[Gate, ...]:
    """All gates, the mean error of the data first."""
    agreement = settings.min_argmax_agreement
    mean, loss, *module = _figures(evidence, evidence.data, settings, None)
    argmax = Gate("argmax agreement", evidence.data.argmax_agreement,
                  ARGMAX_AGREEMENT[settings.precision] if agreement is None else agreement, at_least=True)  # fmt: skip
    tensors = len(evidence.proof.differing) + len(evidence.proof.unexpected)
    of_probes = [gate for probe in evidence.comparisons[1:] for gate in _figures(evidence, probe, settings, probe.name)]
    return (
        mean, loss, argmax, *module, *of_probes,
        Gate("number of tensors that differ from their source", tensors, 0),
        Gate("number of fields that differ from config.json", len(evidence.config_differences), 0),
    )  # fmt: skip


def is_passed(evidence: Evidence, gates: tuple[Gate, ...]) -> bool:
    return all(comparison.not_finite is None for comparison in evidence.comparisons) and all(gate.passed for gate in gates)


def first_difference(evidence: Evidence, comparison: Comparison) -> Difference | None:
    """The first point of a comparison that stands out."""
    rounding = evidence.rounding_of(comparison)
    return comparison.first_difference(FLOOR) if rounding is None else comparison.first_beyond(rounding, ROUNDING)


def _figures(evidence: Evidence, comparison: Comparison, settings: VerifySettings, probe: str | None) -> Iterator[Gate]:
    """The gates that the data and every probe have. (A probe has too few tokens for a share of best ones.)"""
    precision = settings.precision
    yield Gate("mean |Δlogit|", comparison.mean_error, settings.max_mean_error or MEAN_ERROR[precision], probe=probe)
    allowed = settings.max_loss_difference or LOSS_DIFFERENCE[precision]
    yield Gate("|Δloss|", comparison.loss_difference, allowed, probe=probe)
    if settings.max_mean_error is not None:
        return
    rounding = evidence.rounding_of(comparison)
    if rounding is None:
        yield Gate("largest relative error of a module", comparison.worst.relative, MODULE_ERROR, probe=probe)
    else:
        name = "largest error of a module, in those of transformers' rounding"
        yield Gate(name, comparison.times(rounding), ROUNDING, probe=probe)
