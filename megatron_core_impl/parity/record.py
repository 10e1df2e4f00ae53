"""The reference, run on batches and written down: what it computes at every point.

In half precision the reference runs twice: in single precision to be written down, and then in half precision to be measured
against that, as ours is. What it is off by is rounding, and ours may be off by as much.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl.parity.expected import ROWS, Expected
from megatron_core_impl.parity.figures import LOGITS, Part, Reference, Sums, points
from megatron_core_impl.parity.probes import Batch, Progress


@dataclass(frozen=True)
class Oracle:
    """The model that is right by definition, such as transformers'.

    `logits(batch)` computes [B, S', V] of a batch: of all its positions, or of those alone where a token is compared.
    """

    module: nn.Module
    logits: Callable[[Batch], Tensor]
    num_layers: int
    own_name: Callable[[str], str] = str  # canonical name of a submodule -> its name in `module`


@torch.no_grad()
def record(
    oracle: Oracle, batches: Sequence[Batch], expected: Expected, progress: Progress = lambda number, batch: None
) -> list[Reference]:
    """Run a model on batches, write its activations of the compared tokens, and return what it says of each batch."""
    found = []
    for number, batch in enumerate(batches):
        progress(number, batch)
        broken: list[str] = []

        def keep(point: str, rows: Tensor, number: int = number, broken: list[str] = broken) -> None:
            if not broken and not torch.isfinite(rows).all():
                broken.append(point)
            expected.append(number, point, rows)

        loss, _, best = _run(oracle, batch, keep)
        found.append(Reference(loss, best, broken[0] if broken else None))
    return found


@torch.no_grad()
def measure(
    oracle: Oracle, batches: Sequence[Batch], expected: Expected, progress: Progress = lambda number, batch: None
) -> list[Part]:
    """Run a model on batches, and compare it with what another has written, as ours is compared."""
    found = []
    for number, batch in enumerate(batches):
        progress(number, batch)
        part, parts, done = Part(number, {}), batch.parts, dict.fromkeys(points(oracle.num_layers), 0)

        def check(point: str, rows: Tensor, part: Part = part, parts: Tensor = parts, done: dict[str, int] = done) -> None:
            first = done[point]
            done[point] += len(rows)
            sums = part.sums.setdefault(point, Sums())
            for (start, stop), theirs in expected.blocks(part.batch, point, (first, done[point]), rows.shape[1]):
                mine = rows[start - first : stop - first].float()
                sums.add(mine, theirs.to(mine.device), parts[:, start:stop].to(mine.device))

        part.loss, highest, best = _run(oracle, batch, check)
        part.best = highest, best
        found.append(part)
    return found


def _run(oracle: Oracle, batch: Batch, see: Callable[[str, Tensor], None]) -> tuple[float, list[float], list[int]]:
    """Show each point's rows of the compared tokens [R, X], the logits in several parts.

    Returns:
        The sum of the losses; and of each token the highest logit, and whose it is.
    """

    def hook(point: str) -> Callable[[nn.Module, object, object], None]:
        def on_output(_module: nn.Module, _arguments: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output  # attention of transformers returns its weights too
            assert isinstance(value, Tensor)
            # At once: a later module may write into its input.
            see(point, value.reshape(*batch.tokens.shape, -1)[batch.is_compared.to(value.device)])

        return on_output

    with ExitStack() as hooks:
        for point in points(oracle.num_layers)[:-1]:
            module = oracle.module.get_submodule(oracle.own_name(point))
            hooks.callback(module.register_forward_hook(hook(point)).remove)
        logits = oracle.logits(batch)
    is_computed = batch.is_compared
    if logits.shape[1] != batch.tokens.shape[1]:
        is_computed = is_computed[:, is_computed.any(0)]
    rows = is_computed.nonzero()  # [N, 2] in the order of the packed tokens
    labels, loss = batch.labels[batch.is_compared], 0.0
    highest: list[float] = []
    best: list[int] = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        values = logits[some[:, 0], some[:, 1]].float()  # [R, V]
        see(LOGITS, values)
        loss += F.cross_entropy(values, labels[start : start + ROWS].to(values.device), reduction="sum").item()
        top, ids = values.max(1)
        highest += top.tolist()
        best += ids.tolist()
    return loss, highest, best
