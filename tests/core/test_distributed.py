"""The pool of processes that other tests stand on: a failing or hanging rank ends the test, and says which it was."""

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from distributed import GlooPool, WorkerError


@pytest.fixture(scope="module")
def own_pool() -> Iterator[GlooPool]:
    """Its workers are killed in these tests; those of the session live on."""
    pool = GlooPool()
    yield pool
    pool.close()


def sum_of_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def fail_on_the_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("out of cheese")
    dist.barrier()


def hang() -> None:
    threading.Event().wait()


def test_functions_run_on_every_rank_of_groups_of_any_size(pool: GlooPool) -> None:
    assert pool.run(sum_of_ranks, 2, 10) == [21, 21]
    assert pool.run(sum_of_ranks, 1, 0) == [0]
    assert pool.run(sum_of_ranks, 2, 0) == [1, 1]


def test_a_failing_rank_ends_the_run_though_others_wait_for_it(own_pool: GlooPool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)^rank 1 of 2:.*fail_on_the_last_rank.*ValueError: out of cheese"):
        own_pool.run(fail_on_the_last_rank, 2)


def test_a_hang_is_cut_off(own_pool: GlooPool) -> None:
    with pytest.raises(WorkerError, match=r"^ranks \[0\] of 1 did not answer in time$"):
        own_pool.run(hang, 1, timeout=1.0)
