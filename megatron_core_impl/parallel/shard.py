"""One parameter as the optimizer sees it: where its gradients add up, and the rows that this rank updates.

Of a parameter with r rows on its tp rank, each of dp replicas owns c = ceil(r / dp) rows. The parameter's storage and its main
gradient have c·dp rows, so that they are gathered and reduced in place; rows beyond r are zero and stay zero. Master weights
and moments exist for the owned rows only. Main gradients, masters and moments are fp32 (fp64 in fp64); where the model itself
computes in that precision, its storage is the master.

Letters: r rows of the parameter, c rows that a dp rank owns, S tokens of a micro batch, I and O features of a linear layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_core_impl.checkpoint.slicing import owned_slice
from megatron_core_impl.layers.accumulate import add_, add_product_
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import Mesh


class Shard:
    """A parameter, its main gradient, and the optimizer state of the rows that this rank owns. It is the parameter's sink.

    The main gradient holds rubbish until the first gradient of a step overwrites it, so that nobody has to zero it.

    Args:
        parameter: moves into storage of the shard's making, and its gradients come here from now on.
        mesh: the model's.
        moments: names of the optimizer's state, one number per number of the parameter each.
    """

    def __init__(self, parameter: ShardedParameter, mesh: Mesh, moments: Sequence[str]) -> None:
        dp, rows = mesh.layout.dp, parameter.shape[0]
        block = -(-rows // dp)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.parameter = parameter
        self.data = parameter.data  # [c·dp, ...]
        if block * dp != rows:
            self.data = parameter.data.new_zeros(block * dp, *parameter.shape[1:])
            self.data[:rows] = parameter.data
            parameter.data = self.data[:rows]
        self.main_grad = torch.empty_like(self.data, dtype=wide)  # [c·dp, ...]
        self.own_data = self.data.chunk(dp)[mesh.dp_rank]  # [c, ...]
        self.own_grad = self.main_grad.chunk(dp)[mesh.dp_rank]  # [c, ...]
        self.master = nn.Parameter(self.own_data.to(wide))  # [c, ...]; the same storage where the types are the same
        self.master.grad = self.own_grad
        self.moments = {name: torch.zeros_like(self.master, requires_grad=False) for name in moments}
        self.piece = owned_slice(parameter.piece, rows, dp, mesh.dp_rank)
        self.is_empty = True  # no gradient of this step has come yet
        self.is_closed = False  # no further gradient may come: the sum is on its way to other ranks
        self.on_gradient: Callable[[], None] | None = None  # called after each gradient
        parameter.sink = self
        parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Forget all gradients, and take new ones."""
        self.is_empty, self.is_closed = True, False

    def close(self) -> None:
        """Take no more gradients. Where none came, their sum is zero."""
        if self.is_empty and not self.is_closed:
            self.main_grad.zero_()
        self.is_closed = True

    @torch.no_grad()
    def add(self, grad: Tensor) -> None:
        """Take a gradient of the parameter's shape, in any precision."""
        target, is_first = self._target()
        if is_first:
            target.copy_(grad)
        else:
            add_(target, grad)
        self._took()

    @torch.no_grad()
    def add_product(self, grad_output: Tensor, x: Tensor) -> None:
        """Take the gradient of a linear layer's weight, dyᵀ x: [S, O], [S, I] → [O, I]."""
        target, is_first = self._target()
        add_product_(target, grad_output, x, is_first=is_first)
        self._took()

    @torch.no_grad()
    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """Take the gradient of an embedding without making it whole: `grad` [S, I] adds to the rows with numbers `rows` [S]."""
        target, is_first = self._target()
        if is_first:
            target.zero_()
        target.index_add_(0, rows, grad.to(target.dtype))
        self._took()

    def states(self, name: str) -> list[tuple[str, Tensor]]:
        """What a checkpoint holds of this parameter: names and [c, ...] tensors, of which the first rows are `piece`."""
        return [(name, self.master.data), *((f"{moment}.{name}", values) for moment, values in self.moments.items())]

    def round(self) -> None:
        """Bring the master into the model's precision, in this rank's rows."""
        if self.own_data.dtype != self.master.dtype:
            self.own_data.copy_(self.master.data)

    def _take(self, parameter: Tensor) -> None:
        """What autograd has left in `.grad`: nothing, where a layer's backward has come here itself."""
        if parameter.grad is not None:
            self.add(parameter.grad)
            parameter.grad = None

    def _target(self) -> tuple[Tensor, bool]:
        """The rows of the main gradient that gradients are of, and whether they hold nothing yet."""
        if self.is_closed:
            raise RuntimeError(
                f"{self.parameter.spec.name} gets a gradient after those of this step were summed up: there were more backward "
                "passes than begin_step(num_microbatches) announced, or one after complete_gradients"
            )
        rows = self.parameter.shape[0]
        is_first, self.is_empty = self.is_empty, False
        if is_first and rows < self.main_grad.shape[0]:
            self.main_grad[rows:].zero_()  # the last step's reduction may have left anything there
        return self.main_grad[:rows], is_first

    def _took(self) -> None:
        if self.on_gradient is not None:
            self.on_gradient()
