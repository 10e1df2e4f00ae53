"""Which samples a step trains on: a pure function of how many samples came before. No state, nothing to restore.

Micro batch k of a step covers the next `micro_batch_size * dp` samples of the global order, and dp rank r takes the r-th
`micro_batch_size` of them (Megatron's `single` data loader). So the set of samples of a step does not depend on dp or on the
micro batch size, and training resumes under another layout with the samples it would have seen.
"""


def step_samples(
    step_start_sample: int, global_batch_size: int, micro_batch_size: int, dp: int, dp_rank: int
) -> list[list[int]]:
    """The numbers of the samples of one step on one dp rank: one list for each micro batch.

    `step_start_sample` is the number of samples consumed before the step.

    Raises:
        ValueError: the global batch is no whole number of micro batches on every rank.
    """
    unit = micro_batch_size * dp
    if global_batch_size % unit:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size × dp = {micro_batch_size} × {dp}"
        )
    if not 0 <= dp_rank < dp:
        raise ValueError(f"dp_rank={dp_rank} must be from 0 to {dp - 1}")
    first = step_start_sample + dp_rank * micro_batch_size
    starts = range(first, first + global_batch_size, unit)
    return [list(range(start, start + micro_batch_size)) for start in starts]
