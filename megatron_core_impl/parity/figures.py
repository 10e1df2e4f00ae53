"""How far two models are apart: sums at every point, added up over batches and ranks, and the figures made of them.

Letters: R rows (tokens) at a point of the model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

LOGITS = "lm_head"  # the point whose hidden state is the logits themselves
PARTS = ("relative", "start", "early", "late")  # of a sequence: see `Difference`


def points(num_layers: int) -> list[str]:
    """Where two models are compared, in the order in which it is computed: the outputs of these modules, and the logits."""
    names = ["model.embed_tokens"]
    for i in range(num_layers):
        names += [f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", f"model.layers.{i}"]
    return [*names, "model.norm", LOGITS]


@dataclass
class Sums:
    """Sums over some numbers of one point, in float64."""

    absolute: float = 0.0  # of |ours - reference|
    largest: float = 0.0
    count: int = 0
    squares: list[float] = field(default_factory=lambda: [0.0] * 8)  # by part: of the differences, then of the reference
    is_finite: bool = True  # whether ours are all finite

    def add(self, ours: Tensor, reference: Tensor, parts: Tensor) -> None:
        """Add some rows [R, X]; `parts` [4, R] says which of them belong to each of `PARTS`."""
        if not ours.numel():
            return
        self.is_finite = self.is_finite and bool(torch.isfinite(ours).all())
        error = (ours - reference).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        self.absolute += error.sum(dtype=torch.float64).item()
        self.largest = max(self.largest, error.max().item())
        self.count += error.numel()
        # Rows outside a part are left out, not multiplied by 0: they may be infinite.
        rows = torch.stack([error.double().square_().sum(1), reference.double().square_().sum(1)], 1)  # [R, 2]
        found = [rows[part].sum(0).tolist() for part in parts]
        self.squares = [a + b for a, b in zip(self.squares, (x for both in found for x in both), strict=True)]

    def merge(self, other: Self) -> None:
        """Add what another rank, or another batch, has summed up."""
        self.absolute += other.absolute
        self.largest = max(self.largest, other.largest)
        self.count += other.count
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        self.is_finite = self.is_finite and other.is_finite

    @property
    def mean(self) -> float:
        return self.absolute / self.count if self.count else 0.0

    def relative(self, part: int) -> float:
        """Root mean square of the difference over that of the reference, in one of `PARTS`."""
        error, size = self.squares[2 * part : 2 * part + 2]
        if not math.isfinite(error) or not math.isfinite(size):
            return math.inf
        return math.sqrt(error / size) if size else (math.inf if error else 0.0)


@dataclass(frozen=True)
class Difference:
    """How far ours is from the reference at one point of the model, over all batches of a comparison.

    Relative errors are root mean square of the difference over root mean square of the reference, 0 where both are 0 and
    infinite where one is not finite. `start`, `early` and `late` are those at position 0, at the next few positions, and in
    the second half of the sequence.
    """

    module: str
    mean: float
    max: float
    relative: float
    start: float
    early: float
    late: float

    @classmethod
    def of(cls, module: str, sums: Sums) -> Self:
        parts = {name: sums.relative(k) for k, name in enumerate(PARTS)}
        return cls(module=module, mean=sums.mean, max=sums.largest, **parts)

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer, None outside the layers."""
        return layer_of(self.module)

    @property
    def output(self) -> str:
        """What the point is, in words."""
        words = {"self_attn": "attention output", "mlp": "mlp output", "embed_tokens": "embedding output"}
        last = self.module.rsplit(".", 1)[-1]
        return words.get(last, {"norm": "final norm", LOGITS: "logits"}.get(last, "layer output"))


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a module or a tensor is in, None outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


@dataclass(frozen=True)
class Reference:
    """What the reference computed from one batch, besides its activations."""

    loss: float  # sum over the compared tokens of the cross-entropy, in fp32 from the logits
    best: list[int]  # of each compared token, the likeliest next id
    broken: str | None  # the first point with NaN or infinity


@dataclass
class Part:
    """What one rank of ours found about one batch."""

    batch: int
    sums: dict[str, Sums]
    loss: float | None = None  # sum over the compared tokens, as training computes it; told by one rank of all
    best: tuple[list[float], list[int]] | None = None  # of each compared token: the highest of this rank's logits, and its id

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Back from what `dataclasses.asdict` made of one."""
        best = values["best"]
        return cls(
            batch=values["batch"],
            sums={name: Sums(**sums) for name, sums in values["sums"].items()},
            loss=values["loss"],
            best=None if best is None else (best[0], best[1]),
        )


@dataclass(frozen=True)
class Comparison:
    """The outcome for some batches: figures of the logits and losses, and a `Difference` per point, as they are computed."""

    name: str  # of the batches
    tokens: int
    mean_error: float  # mean |Δlogit|
    max_error: float
    loss_ours: float  # mean over tokens of the cross-entropy: ours as training computes it,
    loss_reference: float  # the reference's in fp32 from its logits
    argmax_agreement: float  # share of the tokens whose best next token is the same
    differences: tuple[Difference, ...]
    not_finite: str | None  # "<side>: <module>" where NaN or infinity appeared first

    @property
    def loss_difference(self) -> float:
        return abs(self.loss_ours - self.loss_reference)

    @property
    def worst(self) -> Difference:
        """The point with the largest relative error."""
        return max(self.differences, key=lambda difference: difference.relative)

    def first_difference(self, floor: float) -> Difference | None:
        """The first point that stands out: relative error above `floor`, and ten times that of all points before it.

        Rounding makes errors grow slowly with depth; a fault makes one jump. None where nothing stands out.
        """
        largest = 0.0
        for difference in self.differences:
            if difference.relative > max(floor, 10 * largest):
                return difference
            largest = max(largest, difference.relative)
        return None

    def first_beyond(self, rounding: "Comparison", times: float) -> Difference | None:
        """The first point whose relative error is more than so many times that of another comparison. None where none is."""
        pairs = zip(self.differences, rounding.differences, strict=True)
        return next((ours for ours, theirs in pairs if ours.relative > times * theirs.relative), None)

    def times(self, rounding: "Comparison") -> float:
        """The largest relative error of a point, in those of another comparison at the same point."""
        pairs = zip(self.differences, rounding.differences, strict=True)
        return max(
            ours.relative / theirs.relative if theirs.relative else (math.inf if ours.relative else 0.0)
            for ours, theirs in pairs
        )

    def agreement_before(self, point: Difference) -> float:
        """The largest relative error of the points before one."""
        before = self.differences[: self.differences.index(point)]
        return max((difference.relative for difference in before), default=0.0)


def compared(name: str, num_layers: int, references: Mapping[int, Reference], parts: Iterable[Part]) -> Comparison:
    """Put together what all ranks found about the batches of one comparison.

    Args:
        references: by number of the batch; of the batches of this comparison.
        parts: of all ranks; those of other batches are left out.
    """
    own = [part for part in parts if part.batch in references]
    sums = {point: Sums() for point in points(num_layers)}
    for part in own:
        for point, found in part.sums.items():
            sums[point].merge(found)
    tokens = sum(len(reference.best) for reference in references.values())
    same = sum(
        sum(mine == theirs for mine, theirs in zip(_best(own, number), reference.best, strict=True))
        for number, reference in references.items()
    )
    return Comparison(
        name=name,
        tokens=tokens,
        mean_error=sums[LOGITS].mean,
        max_error=sums[LOGITS].largest,
        loss_ours=sum(part.loss for part in own if part.loss is not None) / tokens,
        loss_reference=sum(reference.loss for reference in references.values()) / tokens,
        argmax_agreement=same / tokens,
        differences=tuple(Difference.of(point, total) for point, total in sums.items()),
        not_finite=_first_broken(sums, references.values()),
    )


def _best(parts: Sequence[Part], batch: int) -> list[int]:
    """The likeliest next id of each token, of all ranks' parts of the vocabulary; the lower one where two are alike."""
    ranks = [part.best for part in parts if part.batch == batch and part.best is not None]
    rows = zip(*(zip(values, ids, strict=True) for values, ids in ranks), strict=True)
    return [max(row, key=lambda found: (found[0], -found[1]))[1] for row in rows]


def _first_broken(sums: Mapping[str, Sums], references: Iterable[Reference]) -> str | None:
    theirs = {reference.broken for reference in references}
    for point, found in sums.items():
        if point in theirs:
            return f"transformers: {point}"
        if not found.is_finite:
            return f"ours: {point}"
    return None
