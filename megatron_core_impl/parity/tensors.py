"""Two forms of the same weights, tensor by tensor: all there, of the same shape, and the same bits.

What is merely renamed, cut, joined or fused keeps its bits. Where one form has another precision, each number must be the other
one's, rounded.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from megatron_core_impl.checkpoint.proven import read_as, same_bytes
from megatron_core_impl.checkpoint.reshard import check_tensors
from megatron_core_impl.checkpoint.slicing import row_blocks, whole
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import TensorSpec

LISTED = 20  # names in a report, at most


@dataclass(frozen=True)
class TensorProof:
    """What became of the tensors of a model: `metrics.tensors` of every artifact that reshapes or compares weights."""

    tensors: int
    bytes: int  # of the result
    exact: int  # tensors that are the source's, bit for bit
    rounded: int  # tensors that are the source's, rounded to another precision
    dtypes: tuple[str, ...]  # of the result
    differing: tuple[str, ...]  # tensors that are neither, in the order of the forward pass
    unexpected: tuple[str, ...]  # tensors of the result that the model does not have

    def report(self) -> dict[str, Any]:
        """The same as JSON values, of long lists the beginning."""
        lists = {name: list(getattr(self, name)[:LISTED]) for name in ("dtypes", "differing", "unexpected")}
        return asdict(self) | lists

    @property
    def is_equal(self) -> bool:
        return not self.differing and not self.unexpected


def prove(
    ours: WeightsSource, source: WeightsSource, specs: Sequence[TensorSpec],
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> TensorProof:  # fmt: skip
    """Compare weights with those they were made of, one block of rows in memory at a time.

    Raises:
        WeightsError: one side lacks a tensor of the model or holds another shape, or is damaged.
    """
    check_tensors(ours, specs)
    check_tensors(source, specs)
    differing = []
    total, done = sum(prod(spec.shape) for spec in specs), 0
    for spec in specs:
        if not _is_equal(ours, source, spec):
            differing.append(spec.name)
        done += prod(spec.shape)
        progress(done, total)
    return proven(ours, source, specs, differing=differing)


def proven(
    ours: WeightsSource, source: WeightsSource, specs: Sequence[TensorSpec], *, differing: Collection[str] = ()
) -> TensorProof:
    """What is to be told of weights whose values were compared already, as `checkpoint.reshard` does while it writes them.

    Args:
        differing: the tensors that were found to differ.
    """
    names, dtypes = {spec.name for spec in specs}, {spec.name: ours.dtype(spec.name) for spec in specs}
    rounded = sum(dtypes[name] != source.dtype(name) for name in names if name not in differing)
    return TensorProof(
        tensors=len(specs),
        bytes=sum(prod(spec.shape) * dtypes[spec.name].itemsize for spec in specs),
        exact=len(specs) - rounded - len(differing),
        rounded=rounded,
        dtypes=tuple(sorted({dtype.name for dtype in dtypes.values()})),
        differing=tuple(differing),
        unexpected=tuple(name for name in ours.names if name not in names),
    )


def _is_equal(ours: WeightsSource, source: WeightsSource, spec: TensorSpec) -> bool:
    dtype = ours.dtype(spec.name)
    size = max(dtype.itemsize, source.dtype(spec.name).itemsize)
    return all(
        same_bytes(ours.read_bytes(spec.name, block), read_as(source, spec.name, block, dtype))
        for block in row_blocks(whole(spec.shape), size)
    )
