"""Data-parallel communication by buckets, one per transformer layer, so that it runs under the computation of other layers.

Gradients: a bucket is complete when each of its layer's parameters has had a gradient of every micro batch of the step,
whatever the pipeline's schedule. Its reduce-scatter starts there and then, while the backward passes of earlier layers run.
Weights: after the update each bucket's all-gather starts, in the order of the forward pass, and is waited for where the layer
begins its next forward pass.

All ranks of a group must issue its collectives in one order, so buckets are reduced in the reverse order of the model and in no
other: one that is complete too early waits for its turn.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from megatron_core_impl import collectives
from megatron_core_impl.collectives import Launched
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.shard import Shard


class Bucket:
    """Parameters whose gradients are reduced, and whose values are gathered, in one launch.

    Args:
        shards: all of them.
        counted: those of a transformer layer, which get one gradient per micro batch each. The others get theirs before these
            do (final norm and output layer), or there are no others to count by (the embedding).
    """

    def __init__(self, shards: Sequence[Shard], counted: Sequence[Shard], mesh: Mesh) -> None:
        self.shards, self.counted, self.mesh = shards, counted, mesh
        self.missing = math.inf  # gradients that have not come yet; infinity: nobody knows
        self.is_reducing = False
        self._reduction: Launched | None = None
        self._gathering: Launched | None = None

    def open(self, num_microbatches: int) -> None:
        self.missing = num_microbatches * len(self.counted) or math.inf
        self.is_reducing = False

    def start_reducing(self) -> None:
        """Sum the main gradients over dp: each rank gets its rows of the sum."""
        for shard in self.shards:
            shard.close()
        self.is_reducing = True
        self._reduction = collectives.reduce_scatter_blocks_(
            [shard.main_grad for shard in self.shards], self.mesh.dp_group, self.mesh.dp_rank
        )

    def finish_reducing(self) -> None:
        _finish(self._reduction)
        self._reduction = None

    def start_gathering(self) -> None:
        """Bring the rows of all ranks into every model."""
        self._gathering = collectives.all_gather_blocks_(
            [shard.data for shard in self.shards], self.mesh.dp_group, self.mesh.dp_rank
        )

    def finish_gathering(self) -> None:
        _finish(self._gathering)
        self._gathering = None


class Buckets:
    """All of a rank's parameters in buckets. Where there is no dp, nothing is called and nothing is hooked.

    Args:
        model: its layers wait for their weights.
        shards: of all its parameters, in the order of the forward pass.
        mesh: the model's.
        settings: what overlaps.
    """

    def __init__(self, model: nn.Module, shards: Sequence[Shard], mesh: Mesh, settings: OptimizerSettings) -> None:
        self._settings = settings
        self.in_order = list(_buckets(shards, mesh)) if mesh.dp_group is not None else []
        self._waiting = list(self.in_order)  # to be reduced, the last one first
        for bucket in self.in_order:
            if settings.overlap_reduce:
                for shard in bucket.counted:
                    shard.on_gradient = partial(self._count, bucket)
            if settings.overlap_gather:
                for module in _smallest_holders(model, {shard.parameter for shard in bucket.counted or bucket.shards}):
                    module.register_forward_pre_hook(partial(_wait_for, bucket))

    def open(self, num_microbatches: int) -> None:
        """Begin a step; 0 micro batches: their number is not known, and nothing is reduced before `finish_reducing`."""
        self._waiting = list(self.in_order)
        for bucket in self.in_order:
            bucket.finish_reducing()
            bucket.open(num_microbatches)

    def finish_reducing(self) -> None:
        """Reduce what is not under way yet, and wait for all of it."""
        while self._waiting:
            self._waiting.pop().start_reducing()
        for bucket in self.in_order:
            bucket.finish_reducing()

    def start_gathering(self) -> None:
        for bucket in self.in_order:
            bucket.start_gathering()
            if not self._settings.overlap_gather:
                bucket.finish_gathering()

    def finish_gathering(self) -> None:
        for bucket in self.in_order:
            bucket.finish_gathering()

    def _count(self, bucket: Bucket) -> None:
        bucket.missing -= 1
        while self._waiting and self._waiting[-1].missing == 0:
            self._waiting.pop().start_reducing()


def _buckets(shards: Sequence[Shard], mesh: Mesh) -> Iterator[Bucket]:
    """The embedding; each layer; with the last one the final norm and the output layer, whose gradients precede its."""
    layers: dict[int, list[Shard]] = {}
    before: list[Shard] = []
    after: list[Shard] = []
    for shard in shards:
        spec = shard.parameter.spec
        if spec.place == "layer":
            layers.setdefault(spec.layer, []).append(shard)
        elif spec.place == "first" or (spec.place == "ends" and mesh.pp_rank == 0):
            before.append(shard)
        else:
            after.append(shard)
    if before:
        yield Bucket(before, [], mesh)
    for number, layer in layers.items():
        yield Bucket(layer + (after if number == max(layers) else []), layer, mesh)


def _smallest_holders(module: nn.Module, parameters: set[nn.Parameter]) -> list[nn.Module]:
    """The innermost modules that hold all of the parameters: those that a forward pass enters before it uses any of them.

    More than one where several modules share the parameters, as embedding and output layer share a tied one.
    """
    inner = [child for child in module.children() if parameters <= set(child.parameters())]
    return [holder for child in inner for holder in _smallest_holders(child, parameters)] or [module]


def _wait_for(bucket: Bucket, module: nn.Module, inputs: object) -> None:
    bucket.finish_gathering()


def _finish(launched: Launched | None) -> None:
    if launched is not None:
        launched.wait()
