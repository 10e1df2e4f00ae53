"""Collectives on plain local tensors.

Tensor parallelism with sequence parallelism (https://arxiv.org/abs/2205.05198): outside a pair of column- and row-parallel
layers the tokens of a micro batch are shared out over the tp group, inside it the features are. Two conjugate operations
move between the two forms, each the other's backward:

    operation            forward                                backward
    gather tokens        all-gather      [T, F] → [T·tp, F]     reduce-scatter  [T·tp, F] → [T, F]
    reduce-scatter       reduce-scatter  [T·tp, F] → [T, F]     all-gather      [T, F] → [T·tp, F]

Both live in `layers`, fused with the products before or after them. All act on dim 0, and every reduction is a SUM: averages
are the caller's, by the scale of the loss.

Whoever calls one of these names the group. A group of None is an axis of size 1: nothing is called, nothing is copied.
All ranks of a group must issue its collectives in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager  # one launch for many collectives; Megatron uses it too

Group = dist.ProcessGroup | None

# torch 2.13 renames these two and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Pending:
    """The result of a collective that may still be under way: what is computed before `wait()` overlaps with it."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def all_gather(x: Tensor, group: Group) -> Pending:
    """[T, ...] of every rank → [T·size, ...] on every rank, in the order of ranks. `x` must not change until it is done."""
    if group is None:
        return Pending(x)
    x = x.contiguous()
    gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return Pending(gathered, _all_gather(gathered, x, group=group, async_op=True))


def reduce_scatter(x: Tensor, group: Group) -> Pending:
    """[T·size, ...] on every rank → the SUM's rows of this rank, [T, ...]. `x` must not change until it is done."""
    if group is None:
        return Pending(x)
    x = x.contiguous()
    share = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Pending(share, _reduce_scatter(share, x, group=group, async_op=True))


def all_reduce_(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over the group, in place; only ever for a tensor that the caller has just made."""
    if group is not None:
        dist.all_reduce(x, op, group=group)
    return x


class Launched(Protocol):
    """Collectives that may still be under way."""

    def wait(self) -> Any: ...


def reduce_scatter_blocks_(blocks: Sequence[Tensor], group: Group, rank: int) -> Launched | None:
    """Of each [size·c, ...] tensor, leave in this rank's own c rows their SUM over the group; the other rows become undefined.

    One launch for all of them, which returns at once; None: there is nothing to wait for. Needs no memory beside the tensors.
    """
    if group is None:
        return None
    with _coalescing_manager(group=group, async_ops=True) as launched:
        for block in blocks:
            _reduce_scatter(block.chunk(group.size())[rank], block, group=group)
    return launched  # type: ignore[no-any-return]


def all_gather_blocks_(blocks: Sequence[Tensor], group: Group, rank: int) -> Launched | None:
    """Of each [size·c, ...] tensor, send this rank's own c rows to all and receive theirs.

    One launch for all of them, which returns at once; None: there is nothing to wait for.
    """
    if group is None:
        return None
    with _coalescing_manager(group=group, async_ops=True) as launched:
        for block in blocks:
            _all_gather(block, block.chunk(group.size())[rank], group=group)
    return launched  # type: ignore[no-any-return]


def all_reduce_blocks_(blocks: Sequence[Tensor], group: Group) -> None:
    """Leave in each tensor its SUM over the group. One launch for all of them."""
    if group is None or not blocks:
        return
    with _coalescing_manager(group=group, async_ops=True) as launched:
        for block in blocks:
            dist.all_reduce(block, group=group)
    launched.wait()


class Messages:
    """Messages between single ranks, all under way at once."""

    def __init__(self, works: Sequence[dist.Work] = (), sent: Sequence[Tensor] = ()) -> None:
        self._works, self._sent = works, sent

    def wait(self) -> None:
        """After it, what was to be received is there, and what was sent is let go. May be called again."""
        for work in self._works:  # NCCL has one for all messages, gloo one for each
            work.wait()
        self._works, self._sent = (), ()  # gloo waits for ever when it is asked twice


def send_and_receive(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group) -> Messages:
    """Send tensors to, and receive into tensors from, single ranks of a group, numbered within it.

    At once a rank sends at most one tensor to each other rank. The n-th that a sends to b is the n-th that b receives from a.
    What is sent must not change, and what is received not be read, before `wait()`.
    """
    sends = [(tensor.contiguous(), peer) for tensor, peer in sends]
    messages = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for tensor, peer in sends]
    messages += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor, peer in receives]
    return Messages(dist.batch_isend_irecv(messages), [tensor for tensor, _ in sends])


def connect(group: Group, device: torch.device) -> None:
    """Comes once, on all ranks of a group, before the first message in it: NCCL's first call in a group needs all of them."""
    if group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
