"""Compares two causal language models on the same tokens: logits, loss, and every hidden state on the way there.

A model is right when it computes what the reference computes. Where it does not, the hidden states tell where it went wrong:
up to the fault they agree to rounding, behind it they do not. The first module that stands out is the one to mend, and a look
at its weights on both sides, or at how the error grows along the sequence, often says what happened to it.

Both sides run on each batch one after the other. What the reference computes is kept for that one batch, what ours computes
is reduced to sums as soon as it appears, so memory does not grow with the number of batches.

Shapes: B sequences of S tokens, T = B·S rows (sequence after sequence), H hidden size, V true vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # tokens [B, S], labels [B, S]: int64

ROWS = 512  # logits are compared so many rows at a time: a large vocabulary makes rows of half a megabyte
LOGITS = "lm_head"  # the point whose hidden state is the logits themselves
EPSILON = "rms_norm_eps (layer_norm_epsilon)"  # as config.json calls it, by the kind of norm


@dataclass(frozen=True)
class Side:
    """One of the two models.

    `logits` computes [T, V] or [B, S, V] from tokens [B, S]. Submodules and parameters are asked for by canonical names; a
    model that has others says how to find them. Parameters are whole, except for padding at the end of the vocabulary.
    """

    name: str  # as messages call it
    module: nn.Module
    logits: Callable[[Tensor], Tensor]
    num_layers: int
    own_name: Callable[[str], str] = str  # canonical name of a submodule -> its name in `module`
    parameter: Callable[[str], Tensor | None] | None = None  # by canonical name; None: those of `module`, under these names

    def find(self, name: str) -> Tensor | None:
        """The parameter with a canonical name, if there is one."""
        if self.parameter is not None:
            return self.parameter(name)
        return dict(self.module.named_parameters()).get(name)


@dataclass(frozen=True)
class Difference:
    """How far ours is from the reference at one point of the model, over all batches.

    Relative errors are root mean square of the difference over root mean square of the reference, 0 where both are 0 and
    infinite where ours is not finite. `start`, `early` and `late` are those at position 0, at the next few positions, and in
    the second half of the sequence.
    """

    module: str
    mean: float
    max: float
    relative: float
    start: float
    early: float
    late: float

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer, None outside the layers."""
        parts = self.module.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else None

    @property
    def output(self) -> str:
        """What the point is, in words."""
        words = {"self_attn": "attention output", "mlp": "mlp output", "embed_tokens": "embedding output"}
        last = self.module.rsplit(".", 1)[-1]
        return words.get(last, {"norm": "final norm", LOGITS: "logits"}.get(last, "layer output"))


@dataclass(frozen=True)
class Comparison:
    """The outcome: figures of the logits and losses, and one `Difference` per point in the order of computation."""

    tokens: int
    mean_error: float  # mean |Δlogit|
    max_error: float
    loss_ours: float  # mean over tokens of the cross-entropy, both sides in fp32 from their logits
    loss_reference: float
    argmax_agreement: float  # share of the tokens whose best next token is the same
    differences: tuple[Difference, ...]
    not_finite: str | None  # "<side>: <module>" where NaN or infinity appeared first

    @property
    def loss_difference(self) -> float:
        return abs(self.loss_ours - self.loss_reference)

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

    def agreement_before(self, point: Difference) -> float:
        """The largest relative error of the points before one."""
        before = self.differences[: self.differences.index(point)]
        return max((difference.relative for difference in before), default=0.0)


def points(num_layers: int) -> list[str]:
    """The modules whose outputs are compared, in the order in which they are computed; the logits come after them."""
    names = ["model.embed_tokens"]
    for i in range(num_layers):
        names += [f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", f"model.layers.{i}"]
    return [*names, "model.norm"]


@torch.no_grad()
def compare(ours: Side, reference: Side, batches: Iterable[Batch]) -> Comparison:
    """Compare two models on batches of one shape, on the device that each model is on.

    Raises:
        ValueError: the sides differ in layers or in the shape of an output, or there is no batch.
    """
    if ours.num_layers != reference.num_layers:
        raise ValueError(
            f"num_hidden_layers={ours.num_layers} of {ours.name} is not the {reference.num_layers} of {reference.name}"
        )
    names = points(ours.num_layers)
    sums = {name: _Sums() for name in [*names, LOGITS]}
    tally = _LogitTally()
    broken: list[str] = []
    for tokens, labels in batches:
        expected = _record(reference, names, tokens, broken)

        def check(name: str, value: Tensor, expected: dict[str, Tensor] = expected, shape: torch.Size = tokens.shape) -> None:
            theirs = expected.pop(name)
            if value.shape != theirs.shape:
                raise ValueError(
                    f"{name}: {ours.name} computes {tuple(value.shape)}, {reference.name} computes {tuple(theirs.shape)}"
                )
            _note_broken(broken, ours.name, name, value)
            for start in range(0, len(value), ROWS):
                sums[name].add(
                    value[start : start + ROWS].float(), theirs[start : start + ROWS].to(value).float(), start, shape
                )

        with _observe(ours, names, check):
            logits = _rows(ours.logits(tokens))  # [T, V]
        tally.add(logits, expected[LOGITS].to(logits.device), labels)
        check(LOGITS, logits)
    if tally.tokens == 0:
        raise ValueError("nothing to compare: no batch")
    return Comparison(
        tokens=tally.tokens,
        mean_error=sums[LOGITS].mean,
        max_error=sums[LOGITS].max,
        loss_ours=tally.loss_ours / tally.tokens,
        loss_reference=tally.loss_reference / tally.tokens,
        argmax_agreement=tally.same_argmax / tally.tokens,
        differences=tuple(total.difference(name) for name, total in sums.items()),
        not_finite=broken[0] if broken else None,
    )


def _record(side: Side, names: list[str], tokens: Tensor, broken: list[str]) -> dict[str, Tensor]:
    """Outputs of the named modules and the logits, each [T, ...], for one batch."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        _note_broken(broken, side.name, name, value)
        seen[name] = value.clone()  # a later module may write into its input

    with _observe(side, names, keep):
        logits = _rows(side.logits(tokens))
    _note_broken(broken, side.name, LOGITS, logits)
    return {**seen, LOGITS: logits}


@contextmanager
def _observe(side: Side, names: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, output [T, ...])` for each submodule with these canonical names as it computes."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def on_output(_module: nn.Module, _arguments: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output  # attention of transformers returns its weights too
            assert isinstance(value, Tensor)
            see(name, _rows(value))

        return on_output

    handles = [side.module.get_submodule(side.own_name(name)).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(value: Tensor) -> Tensor:
    """[B, S, X] or [T, X] as [T, X]."""
    return value.reshape(-1, value.shape[-1])


def _note_broken(broken: list[str], side: str, name: str, value: Tensor) -> None:
    if not broken and not torch.isfinite(value).all():
        broken.append(f"{side}: {name}")


class _Sums:
    """Sums over rows at one point, in float64."""

    def __init__(self) -> None:
        self.absolute, self.max, self.count = 0.0, 0.0, 0
        self.squares: Tensor | None = None  # [2, S]: of the difference, of the reference, per position

    def add(self, ours: Tensor, theirs: Tensor, first_row: int, shape: torch.Size) -> None:
        """Add some rows [R, X] of a batch [B, S]; `first_row` is their place in its T rows."""
        error = (ours - theirs).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        self.absolute += error.sum(dtype=torch.float64).item()
        self.max = max(self.max, error.max().item())
        self.count += error.numel()
        position = torch.arange(first_row, first_row + len(ours), device=ours.device) % shape[1]
        if self.squares is None:
            self.squares = torch.zeros(2, shape[1], dtype=torch.float64, device=ours.device)
        self.squares[0].index_add_(0, position, error.double().square().sum(1))
        self.squares[1].index_add_(0, position, theirs.double().square().sum(1))

    @property
    def mean(self) -> float:
        return self.absolute / self.count

    def difference(self, module: str) -> Difference:
        assert self.squares is not None
        length = self.squares.shape[1]

        def relative(start: int, stop: int) -> float:
            error, size = self.squares[:, start:stop].sum(1).tolist()  # type: ignore[index]
            if not math.isfinite(error) or not math.isfinite(size):
                return math.inf
            return math.sqrt(error / size) if size else (math.inf if error else 0.0)

        return Difference(
            module=module,
            mean=self.mean,
            max=self.max,
            relative=relative(0, length),
            start=relative(0, 1),
            early=relative(1, 5),
            late=relative(length // 2, length),
        )


class _LogitTally:
    """Losses and best tokens of both sides, in the same definition: fp32 cross-entropy, summed over tokens."""

    def __init__(self) -> None:
        self.tokens, self.same_argmax = 0, 0
        self.loss_ours, self.loss_reference = 0.0, 0.0

    def add(self, ours: Tensor, theirs: Tensor, labels: Tensor) -> None:
        wanted = labels.reshape(-1).to(ours.device)
        for start in range(0, len(wanted), ROWS):
            rows = slice(start, start + ROWS)
            mine, other = ours[rows].float(), theirs[rows].float()
            self.loss_ours += F.cross_entropy(mine, wanted[rows], reduction="sum").item()
            self.loss_reference += F.cross_entropy(other, wanted[rows], reduction="sum").item()
            self.same_argmax += int((mine.argmax(1) == other.argmax(1)).sum())
        self.tokens += len(wanted)


# ── What may have happened ──────────────────────────────────────────────────────────────────────────────────────────────────


def explain(first: Difference, ours: Side, reference: Side) -> str:
    """The likely cause of a first difference: from the weights where these differ, else from how the error grows."""
    weights = _explain_weights(first.module, ours, reference)
    if weights:
        return weights
    if first.output == "attention output":
        if first.start > 0.1 * first.relative:
            return f"Its weights agree, and position 0 differs too: compare {EPSILON} and how heads share keys and values."
        if first.early < 0.25 * first.late:
            return (
                "Its weights agree, and the error grows along the sequence from 0 at position 0: "
                "this is what a wrong rope_theta or rope scaling looks like."
            )
        return (
            "Its weights agree, and only position 0 is right: "
            "this is what a wrong RoPE convention (interleaved for half-split), or a wrong scale of the scores, looks like."
        )
    if first.output == "mlp output":
        return f"Its weights agree: compare the activation function (hidden_act, or activation) and {EPSILON}."
    if first.output == "final norm":
        return f"Its weight agrees: compare {EPSILON}."
    return "Its weights agree, so it is the computation that differs."


def _explain_weights(module: str, ours: Side, reference: Side) -> str | None:
    """What differs between the two sides in the parameters that one module's output depends on. None where nothing does."""
    pairs = _parameters(module, ours, reference)
    mine, other = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    differing = sorted(name for name in pairs if not torch.equal(*pairs[name]))
    if not differing:
        return None
    if all(_gate_for_up(name) in other and torch.equal(mine[name], other[_gate_for_up(name)]) for name in differing):
        return "gate_proj and up_proj are swapped."
    listed = " and ".join(dict.fromkeys(name.split(".")[-2] for name in differing))
    if all(_is_shifted(*pairs[name]) for name in differing):
        return f"Rows of {listed} are those of {reference.name} shifted by one."
    if all(_is_interleaved(*pairs[name]) for name in differing):
        return (
            f"Rows of {listed} are in the interleaved RoPE convention (Meta's and Megatron-LM's files), "
            "which must be undone at import."
        )
    if all(_has_same_rows(*pairs[name]) for name in differing):
        return f"Rows of {listed} are those of {reference.name} in another order: heads or rows were swapped."
    return f"Weights of {listed} are not those of {reference.name}."


def _parameters(module: str, ours: Side, reference: Side) -> dict[str, tuple[Tensor, Tensor]]:
    """The parameters that a module's output depends on, given that everything before it agrees: (ours, the reference's).

    Both without padding at the end of a vocabulary, on our device, in our dtype.
    """
    parent, _, last = module.rpartition(".")
    mine = {name: parameter.detach() for name, parameter in ours.module.named_parameters()}
    norms = {"self_attn": ["input_layernorm"], "mlp": ["post_attention_layernorm", "mlp_layernorm", "input_layernorm"]}
    normed = next((name for name in norms.get(last, []) if f"{parent}.{name}.weight" in mine), None)
    prefixes = (f"{module}.", *([f"{parent}.{normed}."] if normed else []))
    pairs = {}
    for name, parameter in mine.items():
        if name.startswith(prefixes) and (theirs := reference.find(name)) is not None:
            rows = min(len(parameter), len(theirs))
            pairs[name] = (parameter[:rows], theirs.detach()[:rows].to(parameter))
    return pairs


def _gate_for_up(name: str) -> str:
    """The name of the up projection for that of the gate, and the reverse."""
    words = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return ".".join(words.get(part, part) for part in name.split("."))


def _is_shifted(mine: Tensor, other: Tensor) -> bool:
    """Whether rows moved by one place, up or down."""
    return torch.equal(mine[1:], other[:-1]) or torch.equal(mine[:-1], other[1:])


def _is_interleaved(mine: Tensor, other: Tensor) -> bool:
    """Whether rows 0, 1, 2, … of each head became 0, d/2, 1, … (half-split to interleaved), or the reverse."""
    if not _has_same_rows(mine, other) or len(mine) < 3:
        return False
    return torch.equal(mine[0], other[0]) and (torch.equal(mine[2], other[1]) or torch.equal(mine[1], other[2]))


def _has_same_rows(mine: Tensor, other: Tensor) -> bool:
    """Whether two parameters hold the same rows in some order, told by the rows' sums and sums of squares."""
    if mine.shape != other.shape:
        return False
    for power in (1, 2):
        a, b = (part.double().pow(power).reshape(len(part), -1).sum(1).sort().values for part in (mine, other))
        if not torch.allclose(a, b, rtol=1e-9, atol=1e-12):
            return False
    return True
