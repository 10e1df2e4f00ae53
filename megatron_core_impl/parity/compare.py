"""Our model, run as training runs it, against what the reference has computed.

All ranks of the layout call `compare`. The batches of one comparison go through the pipeline together, as the micro batches of
a step do, so that schedules, messages and collectives are those of the training; and the loss is the one that training
computes. At every point each rank has its own tokens, T = N/tp of a batch, and compares these. Of the logits it has all tokens
and its own part of the vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_core_impl import collectives
from megatron_core_impl.batches import on_device
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parity.expected import Expected
from megatron_core_impl.parity.figures import LOGITS, Part, Sums, points
from megatron_core_impl.parity.probes import Batch, Progress


@torch.no_grad()
def compare(
    model: Transformer, batches: Sequence[Batch], expected: Expected, progress: Progress = lambda number, batch: None
) -> list[Part]:
    """Run our model on batches, in evaluation mode, and return what this rank finds about each.

    Args:
        batches: those of one comparison, which bear its name, one after the other.
        expected: what `record` has written of them.
        progress: called before the batches of each comparison, with the number of the first.

    Raises:
        ValueError: a point has another size than the reference's.
    """
    model.eval()
    pipeline, found, number = Pipeline(model), [], 0
    for _, group in groupby(batches, key=lambda batch: batch.name):
        some = list(group)
        progress(number, some[0])
        found += _Group(model, some, number, expected).run(pipeline)
        number += len(some)
    return found


class _Group:
    """The batches of one comparison, and what is found about them."""

    def __init__(self, model: Transformer, batches: Sequence[Batch], first: int, expected: Expected) -> None:
        self.model, self.batches, self.expected = model, batches, expected
        made = [batch.micro_batch(model.mesh.layout.tp) for batch in batches]
        self.micro_batches = on_device([micro_batch for micro_batch, _ in made], model.mesh.device)
        self.is_compared = [is_compared for _, is_compared in made]
        self.found = [Part(first + k, {}) for k in range(len(batches))]

    def run(self, pipeline: Pipeline) -> list[Part]:
        with ExitStack() as hooks:
            for point in points(self.model.config.num_hidden_layers)[:-1]:
                if (module := self._module(point)) is not None:
                    hooks.callback(module.register_forward_hook(self._hook(point)).remove)
            loss = pipeline.forward(self.micro_batches)
        mesh = self.model.mesh
        if mesh.tp_rank == 0 and mesh.pp_rank == mesh.layout.pp - 1:
            self.found[0].loss = loss.item()  # of all batches
        return self.found

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:  # of another pp rank
            return None

    def _hook(self, point: str) -> Callable[[nn.Module, object, object], None]:
        numbers = iter(range(len(self.batches)))  # a module computes the micro batches in their order

        def on_output(_module: nn.Module, _arguments: object, output: object) -> None:
            assert isinstance(output, Tensor)
            number = next(numbers)
            self._check_rows(number, point, output)
            if point == "model.norm":
                self._check_logits(number, output)

        return on_output

    def _check_rows(self, number: int, point: str, value: Tensor) -> None:
        """This rank's tokens [T, H]."""
        is_compared, tokens = self.is_compared[number], len(value)
        start = self.model.mesh.tp_rank * tokens
        own = is_compared[start : start + tokens]
        first = int(is_compared[:start].sum())  # compared tokens of the ranks before
        rows = value[own.to(value.device)]
        some = (first, first + len(rows))
        self._add(number, point, some, slice(None), lambda start, stop: rows[start - first : stop - first])

    def _check_logits(self, number: int, value: Tensor) -> None:
        """All tokens, and the ids of this rank: computed here, some tokens at a time, as training never has them whole."""
        mesh, weight = self.model.mesh, self.model.lm_head.weight
        gathered = collectives.all_gather(value, mesh.tp_group).wait()  # [N, H]
        hidden = gathered[self.is_compared[number].to(value.device)]
        first, stop = weight.piece[0]
        highest: list[float] = []
        best: list[int] = []

        def logits(start: int, end: int) -> Tensor:
            some = F.linear(hidden[start:end], weight[: stop - first])  # [R, V]
            if stop > first:
                values, ids = some.float().max(1)
                highest.extend(values.tolist())
                best.extend((ids + first).tolist())
            return some

        self._add(number, LOGITS, (0, len(hidden)), slice(first, stop), logits)
        if stop > first:
            self.found[number].best = highest, best

    def _add(self, number: int, point: str, rows: tuple[int, int], columns: slice, ours: Callable[[int, int], Tensor]) -> None:
        batch = self.found[number].batch
        sums = self.found[number].sums.setdefault(point, Sums())
        config = self.model.config
        width, parts = config.vocab_size if point == LOGITS else config.hidden_size, self.batches[number].parts
        has, needs = self.expected.size(batch, point), self.batches[number].num_compared * width
        if has != needs:
            tokens = self.batches[number].num_compared
            raise ValueError(f"{point}: ours computes {width} numbers for a token, the reference {has / tokens:g}")
        for (start, stop), theirs in self.expected.blocks(batch, point, rows, width):
            mine = ours(start, stop).float()
            sums.add(mine, theirs[:, columns].to(mine.device), parts[:, start:stop].to(mine.device))
