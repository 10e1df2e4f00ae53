"""Which part of each global tensor a rank holds. Pure arithmetic: no torch, no processes, no files.

A *slice* of a tensor is one half-open range per dim. Cuts over tp follow `TensorSpec`; cuts over dp are by rows, as ZeRO-1
shards optimizer state: ceil(rows / dp) rows each, so trailing ranks may hold fewer rows, or none.
"""

import math
from collections.abc import Iterator, Sequence

from megatron_core_impl.config import Layout, Range, TensorSpec, balanced, padded_vocab_size

Slice = tuple[Range, ...]
BLOCK_BYTES = 1 << 20  # what is in memory at a time: a block of rows, or what a read of columns takes beside its result


def whole(shape: Sequence[int]) -> Slice:
    """The slice that is the whole tensor."""
    return tuple((0, size) for size in shape)


def shape_of(piece: Slice) -> tuple[int, ...]:
    """Shape of a slice."""
    return tuple(stop - start for start, stop in piece)


def tp_slice(spec: TensorSpec, tp: int, tp_rank: int) -> Slice:
    """The part of a tensor that a tp rank holds: what exists of it, without run-time padding.

    A vocabulary is cut as if padded to 128·tp rows, so the last ranks may hold fewer rows than the first, or none.

    Raises:
        ValueError: tp does not divide the dim.
    """
    piece = list(whole(spec.shape))
    if spec.tp_dim is not None:
        size = spec.shape[spec.tp_dim]
        if spec.heads is not None:
            piece[spec.tp_dim] = spec.heads.range(tp, tp_rank)
            return tuple(piece)
        if spec.padded:
            block = padded_vocab_size(size, tp) // tp
        elif size % tp:
            raise ValueError(f"tp={tp} does not divide dim {spec.tp_dim} of {spec.name}, which has size {size}")
        else:
            block = size // tp
        piece[spec.tp_dim] = (min(tp_rank * block, size), min((tp_rank + 1) * block, size))
    return tuple(piece)


def dp_rows(rows: int, dp: int, dp_rank: int) -> Range:
    """The rows, of `rows` that a (tp, pp) rank holds, whose optimizer state a dp rank owns."""
    block = -(-rows // dp)
    return min(dp_rank * block, rows), min((dp_rank + 1) * block, rows)


def owned_slice(piece: Slice, rows: int, dp: int, dp_rank: int) -> Slice:
    """The part of a (tp, pp) rank's slice whose optimizer state a dp rank owns.

    Args:
        rows: of the parameter in memory: those of the slice, and run-time padding behind them.
    """
    (start, stop), *rest = piece
    low, high = dp_rows(rows, dp, dp_rank)
    return ((min(start + low, stop), min(start + high, stop)), *rest)


def chunk_layers(num_layers: int, layout: Layout, pp_rank: int) -> list[Range]:
    """The layers of each chunk of a pp rank, in the order of the model.

    The model is cut into pp × vpp contiguous chunks, the first ones a layer longer where it does not come out even, and dealt
    out to the pp ranks in turn: chunk c goes to rank c mod pp.
    """
    chunks = layout.pp * layout.vpp
    return [balanced(num_layers, chunks, chunk) for chunk in range(pp_rank, chunks, layout.pp)]


def is_on_pp_rank(spec: TensorSpec, num_layers: int, layout: Layout, pp_rank: int) -> bool:
    """Whether a pp rank holds a tensor."""
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    match spec.place:
        case "first":
            return is_first
        case "last":
            return is_last
        case "ends":
            return is_first or is_last
        case "layer":
            return any(start <= spec.layer < stop for start, stop in chunk_layers(num_layers, layout, pp_rank))


def replica(spec: TensorSpec, layout: Layout, pp_rank: int, tp_rank: int) -> int:
    """0 on the one rank, of all that hold the same part of a tensor on one dp rank, that counts it and writes it."""
    if spec.place == "ends" and pp_rank != 0:
        return 1
    if spec.tp_dim is None:
        return tp_rank
    return spec.heads.replica(layout.tp, tp_rank) if spec.heads is not None else 0


def rank_slices(specs: Sequence[TensorSpec], num_layers: int, layout: Layout, rank: int) -> dict[str, Slice]:
    """All that a rank's model holds: name -> slice, replicas included."""
    pp_rank, _, tp_rank = layout.coordinates(rank)
    return {spec.name: tp_slice(spec, layout.tp, tp_rank) for spec in specs if is_on_pp_rank(spec, num_layers, layout, pp_rank)}


def stored_slices(specs: Sequence[TensorSpec], num_layers: int, layout: Layout, rank: int) -> dict[str, Slice]:
    """What a rank's file holds: name -> slice. Over all ranks they tile every tensor.

    What several ranks hold is stored by the first of them alone; over dp each stores the rows that it owns, if any.
    """
    pp_rank, dp_rank, tp_rank = layout.coordinates(rank)
    stored = {}
    for spec in specs:
        if is_on_pp_rank(spec, num_layers, layout, pp_rank) and replica(spec, layout, pp_rank, tp_rank) == 0:
            piece = tp_slice(spec, layout.tp, tp_rank)
            rows = padded_vocab_size(spec.shape[0], layout.tp) // layout.tp if spec.padded else shape_of(piece)[0]
            piece = owned_slice(piece, rows, layout.dp, dp_rank)
            if shape_of(piece)[0]:
                stored[spec.name] = piece
    return stored


def relative(piece: Slice, origin: Slice) -> Slice:
    """A slice of a tensor as a slice of that part of it which is `origin`."""
    return tuple((start - base, stop - base) for (start, stop), (base, _) in zip(piece, origin, strict=True))


def row_blocks(piece: Slice, itemsize: int, limit: int = BLOCK_BYTES) -> Iterator[Slice]:
    """Cut a slice along dim 0 into slices of at most `limit` bytes, or one row where a row is larger."""
    if not piece:
        yield piece
        return
    row_bytes = math.prod(shape_of(piece[1:])) * itemsize
    rows = max(1, limit // max(1, row_bytes))
    for start in range(*piece[0], rows):
        yield ((start, min(start + rows, piece[0][1])), *piece[1:])
