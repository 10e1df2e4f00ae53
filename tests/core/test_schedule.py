"""Pipeline schedules, proved without processes: they end, with the bubble and memory they should have; broken ones are seen."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Literal

import pytest

from megatron_core_impl.parallel.schedule import (
    Action,
    Receive,
    ScheduleError,
    Step,
    interleaved,
    one_forward_one_backward,
    plan,
    rank_plan,
    schedule,
    simulate,
)


def cases() -> Iterator[tuple[int, int, int]]:
    """All legal (pp, vpp, num_microbatches) of moderate size."""
    for pp in range(1, 9):
        for vpp in range(1, 5 if pp > 1 else 2):
            yield from ((pp, vpp, m) for m in range(1, 17) if vpp == 1 or m % pp == 0)


@cache
def plans(pp: int, vpp: int, num_microbatches: int, *, forward_only: bool = False) -> list[list[Step]]:
    return plan([schedule(pp, vpp, rank, num_microbatches, forward_only=forward_only) for rank in range(pp)], vpp)


def short(actions: Sequence[Action]) -> str:
    """F0 B0, and with several chunks F0.1: micro batch, chunk."""
    several = any(action.chunk for action in actions)
    return " ".join(f"{a.kind[0].upper()}{a.microbatch}" + (f".{a.chunk}" if several else "") for a in actions)


def read(text: str) -> list[Action]:
    """The opposite of `short`."""
    parts = [(word[0], *map(int, (word[1:] + ".0").split(".")[:2])) for word in text.split()]
    return [Action("forward" if kind == "F" else "backward", chunk, microbatch) for kind, microbatch, chunk in parts]


def test_1f1b_is_what_the_paper_shows() -> None:
    """Figure 4 of https://arxiv.org/abs/2104.04473, with 4 devices and 8 micro batches, of which 6 here."""
    assert [short(one_forward_one_backward(4, rank, 6)) for rank in range(4)] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
    ]
    assert [short(one_forward_one_backward(4, rank, 2)) for rank in (0, 2, 3)] == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]


def test_the_interleaved_schedule_is_megatrons() -> None:
    """Warm-up of 2(pp - rank - 1) + (vpp - 1)pp forward passes; groups of pp micro batches; backward in the opposite order."""
    assert [short(interleaved(2, rank, 4, 2)) for rank in range(2)] == [
        "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
        "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
    ]


@pytest.mark.parametrize("backward_time", [1.0, 2.0, 3.0])  # of a forward pass: equal costs; usual; all recomputed
def test_every_plan_ends_with_the_ideal_bubble_and_few_activations(backward_time: float) -> None:
    for pp, vpp, m in cases():
        got = simulate(plans(pp, vpp, m), vpp, m, backward_time=backward_time)
        of_1f1b = (pp - 1) * (1 + backward_time)  # idle time; interleaving divides it by vpp
        assert got.total_time == pytest.approx(m * (1 + backward_time) + of_1f1b / vpp), (pp, vpp, m)
        assert got.bubble == pytest.approx((pp - 1) / (vpp * m + pp - 1)), (pp, vpp, m)
        warmup = [2 * (pp - rank - 1) + (vpp - 1) * pp if vpp > 1 else pp - rank - 1 for rank in range(pp)]
        assert got.in_flight == tuple(min(number + 1, vpp * m) for number in warmup), (pp, vpp, m)


def test_no_two_messages_of_an_exchange_have_the_same_sender_and_receiver() -> None:
    for pp, vpp, m in cases():
        for rank, steps in enumerate(plans(pp, vpp, m)):
            for step in steps:
                sources = [receive.source for receive in step.receives]
                assert len(set(sources)) == len(sources)
                assert rank not in [*sources, step.send]


def test_evaluation_takes_any_number_of_micro_batches() -> None:
    for pp, vpp, m in [(1, 1, 3), (2, 1, 5), (2, 3, 5), (4, 2, 3), (4, 1, 2), (4, 2, 8)]:
        got = simulate(plans(pp, vpp, m, forward_only=True), vpp, m, forward_only=True)
        assert got.in_flight == (0,) * pp
        if vpp == 1 or m % pp == 0:
            assert got.total_time == pytest.approx(m + (pp - 1) / vpp)
    assert short(schedule(2, 2, 0, 3, forward_only=True)) == "F0.0 F1.0 F0.1 F1.1 F2.0 F2.1"


def test_one_rank_alone_has_no_messages() -> None:
    steps = rank_plan(1, 1, 0, 2)
    assert steps == tuple(Step(action) for action in read("F0 B0 F1 B1"))
    assert not any(step.has_exchange for step in steps)


def test_what_arrives_while_a_rank_computes_is_posted_before_it_begins() -> None:
    """Rank 1 of 2 gets the second micro batch while it computes the backward pass of the first."""
    steps = plan([read("F0 F1 F2 B0 B1 B2"), read("F0 B0 F1 B1 F2 B2")], 1)[1]
    posted = {receive.action: number for number, step in enumerate(steps) for receive in step.receives}
    computed = {step.action: number for number, step in enumerate(steps)}
    f2, b0 = read("F2 B0")
    assert posted[f2] < computed[b0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("pp", "vpp", "num_microbatches", "message"),
    [
        (4, 2, 6, r"^num_microbatches=6 is not a multiple of pp=4, .* \(vpp=2\) needs\. Nearest legal: 4, 8; any .* vpp=1$"),
        (4, 2, 3, r"Nearest legal: 4; any number is legal with vpp=1$"),
        (1, 2, 4, r"^vpp=2 needs pp of at least 2"),
        (2, 1, 0, r"^num_microbatches=0 must be at least 1$"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(pp: int, vpp: int, num_microbatches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_plan(pp, vpp, 0, num_microbatches)


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "message"),
    [
        (
            "F0 B0 F1 B1", "F0 F1 B0 B1",
            "ranks wait for each other: rank 0 with the backward pass of micro batch 0 in chunk 0 for the backward pass of "
            "micro batch 0 in chunk 0 on rank 1; rank 1 with the forward pass of micro batch 1 in chunk 0 for the forward pass "
            "of micro batch 1 in chunk 0 on rank 0",
        ),
        ("F0 F1 B0 B1", "B0 F0 F1 B1", "rank 1 computes the backward pass of micro batch 0 in chunk 0 before its forward pass"),
        ("F0 F1 B0 B1", "F0 B0 B0 F1 B1", "rank 1 computes the backward pass of micro batch 0 in chunk 0 twice"),
        ("F0 F1 B0", "F0 B0 F1 B1", "rank 0 never computes the backward pass of micro batch 1 in chunk 0"),
        ("F0 F1 B0 B1", "F0 F1 F2 B0 B1", "ranks wait for each other: .*; rank 1 with the forward pass of micro batch 2 .*"),
        ("F0 F1 F2 B0 B1", "F0 F1 B0 B1", "rank 0 has no need to compute the forward pass of micro batch 2 in chunk 0"),
    ],
)  # fmt: skip
def test_broken_schedules_are_noticed(rank_0: str, rank_1: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=f"^{message}$"):
        simulate(plan([read(rank_0), read(rank_1)], 1), 1, 2)


def test_swapping_a_forward_and_a_backward_pass_of_a_rank_is_never_free() -> None:
    """It breaks the order of forward and backward, or makes ranks wait for each other, or costs time or memory."""
    good = [one_forward_one_backward(3, rank, 4) for rank in range(3)]
    best, refused, dear = simulate(plan(good, 1), 1, 4), 0, 0
    for rank, actions in enumerate(good):
        for first, (one, other) in enumerate(pairwise(actions)):
            if one.kind != other.kind:
                swapped = [*actions[:first], other, one, *actions[first + 2 :]]
                try:
                    got = simulate(plan([swapped if r == rank else good[r] for r in range(3)], 1), 1, 4)
                except ScheduleError:
                    refused += 1
                else:
                    assert got.total_time > best.total_time or got.in_flight > best.in_flight, (rank, short(swapped))
                    dear += 1
    assert (refused, dear) == (4, 11)


def drop_receives(plans: list[list[Step]]) -> None:
    plans[1] = [replace(step, receives=()) for step in plans[1]]


def drop_last_send(plans: list[list[Step]]) -> None:
    number = max(n for n, step in enumerate(plans[0]) if step.send == 1)
    plans[0][number] = replace(plans[0][number], send=None)


def send_to_nobody(plans: list[list[Step]]) -> None:
    number = max(n for n, step in enumerate(plans[1]) if step.send is None and step.action)
    plans[1][number] = replace(plans[1][number], send=0)


def expect_others(plans: list[list[Step]]) -> None:
    """Rank 1 takes the first message for the second."""
    numbers = [n for n, step in enumerate(plans[1]) if step.receives]
    first, second = (plans[1][n].receives for n in numbers[:2])
    plans[1][numbers[0]] = replace(plans[1][numbers[0]], receives=second)
    plans[1][numbers[1]] = replace(plans[1][numbers[1]], receives=first)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (drop_receives, r"rank 1 never receives the input of the forward pass of micro batch 0 in chunk 0$"),
        (drop_last_send, r"rank 0 sends what the forward pass of micro batch 1 in chunk 0 results in to rank None$"),
        (send_to_nobody, r"rank 1 sends what the forward pass of micro batch 1 in chunk 0 results in to rank 0$"),
        (
            expect_others,
            r"rank 0 sends the input of the forward pass of micro batch 0 .*, but rank 1 expects that of the .* 1 in",
        ),
    ],
)
def test_broken_messages_are_noticed(breaks: Callable[[list[list[Step]]], None], message: str) -> None:
    broken = list(map(list, plans(2, 1, 2)))
    breaks(broken)
    with pytest.raises(ScheduleError, match=f"^{message}"):
        simulate(broken, 1, 2)


def test_ranks_that_both_send_first_wait_for_each_other() -> None:
    """Each message by itself: rank 0 sends F1 and rank 1 sends B0, and neither is ready to receive before it has sent."""

    def receive(kind: Literal["forward", "backward"], microbatch: int) -> Step:
        return Step(None, None, (Receive(1 if kind == "backward" else 0, Action(kind, 0, microbatch)),))

    f0, f1, b0, b1 = read("F0 F1 B0 B1")
    broken = [
        [Step(f0, send=1), Step(f1, send=1), receive("backward", 0), Step(b0), receive("backward", 1), Step(b1)],
        [receive("forward", 0), Step(f0), Step(b0, send=0), receive("forward", 1), Step(f1), Step(b1, send=0)],
    ]
    message = (
        "^ranks wait for each other: "
        "rank 0 for rank 1 to receive the input of the forward pass of micro batch 1 in chunk 0; "
        "rank 1 for rank 0 to receive the input of the backward pass of micro batch 0 in chunk 0$"
    )
    with pytest.raises(ScheduleError, match=message):
        simulate(broken, 1, 2)
