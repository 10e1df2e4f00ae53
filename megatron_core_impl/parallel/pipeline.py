"""Runs the passes of a step over the chunks of a pp rank, in the order and with the messages of `parallel.schedule`.

Between chunks travel hidden states [T, H] forward and their gradients backward, T = B·S/tp tokens of the micro batch: each tp
rank sends its share of the tokens to the rank with the same tp and dp numbers. All know the shapes, because all ranks of a pp
group have the micro batches. With pp = 1 there is nobody to send to, and this is the plain loop over micro batches.

Of an activation that was sent, only the graph behind it is kept for the backward pass, not its numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Messages
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.parallel.schedule import Action, Step, rank_plan


class Pipeline:
    """The pp ranks that together hold a model, as one of them sees it. All of them make one, and call the same methods.

    Of the model it needs `mesh`, `dtype`, `hidden_shape` and `forward_chunk`.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        collectives.connect(model.mesh.pp_group, model.mesh.device)

    def forward_backward(self, batches: Sequence[MicroBatch], *, scale: float) -> Tensor:
        """All passes of a step: adds the gradient of scale × the sum of the losses to the parameters' gradients.

        Args:
            batches: this replica's micro batches, the same on all ranks of a pp group. Their lengths may differ.
            scale: what the losses are multiplied by before the backward pass, not in the result.

        Returns:
            The sum of the micro batches' losses on the last pp rank, zero on the others: a scalar in fp64, on the device.

        Raises:
            ValueError: the interleaved schedule cannot take as many micro batches; the message names the legal numbers.
        """
        return _Run(self.model, batches, scale).result()

    @torch.no_grad()
    def forward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """The forward passes alone, of any number of micro batches. Arguments and result as of `forward_backward`.

        Where micro batches say what is an answer, the result on the last pp rank is the sum of the three numbers of each
        (`Transformer.forward_chunk`), [3].
        """
        return _Run(self.model, batches, None).result()


class _Held(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    x: Tensor | None  # [T, H] input that needs a gradient; None: the chunk began with tokens
    output: Tensor | GradientEdge  # the loss, or where in the graph the output was


class _Run:
    """One step on its way."""

    def __init__(self, model: Transformer, batches: Sequence[MicroBatch], scale: float | None) -> None:
        self.model, self.batches, self.scale = model, batches, scale
        self.loss = torch.zeros((), dtype=torch.float64, device=model.mesh.device)
        self.held: dict[tuple[int, int], _Held] = {}  # by chunk and micro batch
        self.inbox: dict[Action, tuple[Tensor, Messages]] = {}  # inputs of actions, there when their messages are
        self.under_way = Messages()

    def result(self) -> Tensor:
        layout, pp_rank = self.model.mesh.layout, self.model.mesh.pp_rank
        for step in rank_plan(layout.pp, layout.vpp, pp_rank, len(self.batches), forward_only=self.scale is None):
            self._exchange(step, self._compute(step))
        self.under_way.wait()
        return self.loss

    def _compute(self, step: Step) -> Tensor | None:
        """A step's pass: [T, H] to send, if any."""
        if step.action is None:
            return None
        received: Tensor | None = None
        if step.action in self.inbox:
            received, messages = self.inbox.pop(step.action)
            messages.wait()
        if step.action.kind == "forward":
            return self._forward(step.action, received, is_last=step.send is None)
        return self._backward(step.action, received)

    def _forward(self, action: Action, x: Tensor | None, *, is_last: bool) -> Tensor | None:
        if x is not None:
            x.requires_grad_()
        y = self.model.forward_chunk(action.chunk, x, self.batches[action.microbatch])
        if self.scale is not None:
            self.held[action.chunk, action.microbatch] = _Held(x, y if is_last else get_gradient_edge(y))
        if is_last:
            self.loss = self.loss + y.detach()  # what an evaluation counts beside the loss, too
            return None
        return y.detach()

    def _backward(self, action: Action, grad: Tensor | None) -> Tensor | None:
        x, output = self.held.pop((action.chunk, action.microbatch))
        if isinstance(output, Tensor):
            assert self.scale is not None
            grad = torch.full_like(output, self.scale)
        torch.autograd.backward(output, grad)
        return x.grad if x is not None else None

    def _exchange(self, step: Step, result: Tensor | None) -> None:
        """Send what the step's pass resulted in, and what others have meanwhile is received."""
        if not step.has_exchange:
            return
        self.under_way.wait()  # so that what was sent before is free again
        sends = [(result, step.send)] if result is not None and step.send is not None else []
        buffers = [
            torch.empty(
                self.model.hidden_shape(self.batches[receive.action.microbatch]),
                dtype=self.model.dtype,
                device=self.model.mesh.device,
            )
            for receive in step.receives
        ]
        sources = [receive.source for receive in step.receives]
        self.under_way = collectives.send_and_receive(sends, list(zip(buffers, sources, strict=True)), self.model.mesh.pp_group)
        for receive, buffer in zip(step.receives, buffers, strict=True):
            self.inbox[receive.action] = buffer, self.under_way
