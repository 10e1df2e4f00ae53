"""Which part of each global tensor a rank holds. Pure arithmetic: no torch, no processes, no files.

A *slice* of a tensor is one half-open range per dim. Cuts over tp follow `TensorSpec`; cuts over dp are by rows, as ZeRO-1
shards optimizer state: ceil(rows / dp) rows each, so trailing ranks may hold fewer rows, or none.
"""

from collections.abc import Sequence

from megatron_core_impl.config import Layout, TensorSpec, padded_vocab_size

Range = tuple[int, int]
Slice = tuple[Range, ...]


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


def pp_layers(num_layers: int, pp: int, pp_rank: int) -> Range:
    """The layers of a pp stage: contiguous, the first stages one longer where pp does not divide them."""
    block, longer = divmod(num_layers, pp)
    start = pp_rank * block + min(pp_rank, longer)
    return start, start + block + (pp_rank < longer)


def is_on_pp_stage(spec: TensorSpec, num_layers: int, pp: int, pp_rank: int) -> bool:
    """Whether a pp stage holds a tensor."""
    if spec.place == "first":
        return pp_rank == 0
    if spec.place == "last":
        return pp_rank == pp - 1
    start, stop = pp_layers(num_layers, pp, pp_rank)
    return start <= spec.layer < stop


def rank_slices(specs: Sequence[TensorSpec], num_layers: int, layout: Layout, rank: int) -> dict[str, Slice]:
    """All that a rank's model holds: name -> slice, replicas over dp and tp included."""
    pp_rank, _, tp_rank = layout.coordinates(rank)
    return {
        spec.name: tp_slice(spec, layout.tp, tp_rank) for spec in specs if is_on_pp_stage(spec, num_layers, layout.pp, pp_rank)
    }
