"""Pipeline schedules as data: which pass a pp rank computes when, and with whom it exchanges what in between. No torch in here.

The model is cut into pp × vpp contiguous chunks, dealt out to the pp ranks in turn: chunk c of rank r is number c·pp + r of the
model. A micro batch goes forward through all of them and backward again, and what one pass results in the next one needs:
hidden states, or their gradient. Each rank has a list of passes, its *schedule*:

    1F1B          (https://arxiv.org/abs/1806.03377, PipeDream-Flush) as few forward passes as keep the others busy, then
                  forward and backward in turn: a rank holds the activations of pp - rank micro batches at most.
    interleaved   (https://arxiv.org/abs/2104.04473) the same with vpp chunks per rank, which divides the bubble by vpp
                  and costs vpp times the messages and more activations.

`plan` adds the messages. It runs the schedules of all ranks by one clock, and lets a rank post what it sends and what it
receives at the same tick as one exchange. So all ranks exchange in the order of one clock, and nothing can deadlock, even where
a message is sent only while its receiver is ready for it and a rank's exchanges happen one after the other, as with NCCL: what
happens by a tick needs messages of earlier ticks only. At a tick a rank finishes one pass at most, so no two messages of an
exchange have the same sender and receiver. What arrives while a rank computes is posted before it begins, and so overlaps with
it. Ranks wait for their messages, not for the clock: `simulate` tells what a plan takes when passes last as long as they last.
"""

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

# How long passes take by the clock of `plan`. A backward pass takes as long as 2 forward passes, or 3 when it recomputes them.
# Planned with 3, the bubble is the ideal one at any real ratio from 1 to 3; planned with 1, it is not for the interleaved one.
TICKS = {"forward": 1, "backward": 3}


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro batch through one chunk of a rank."""

    kind: Literal["forward", "backward"]
    chunk: int  # of this rank, from 0
    microbatch: int

    def __str__(self) -> str:
        return f"the {self.kind} pass of micro batch {self.microbatch} in chunk {self.chunk}"


@dataclass(frozen=True, slots=True)
class Receive:
    """A message to expect: the input of one of this rank's actions."""

    source: int  # pp rank
    action: Action


@dataclass(frozen=True, slots=True)
class Step:
    """A pass, if any, and the exchange that follows it, if any."""

    action: Action | None
    send: int | None = None  # the pp rank that gets what the pass results in; None: it is a loss, or the end of the way back
    receives: tuple[Receive, ...] = ()

    @property
    def has_exchange(self) -> bool:
        return self.send is not None or bool(self.receives)


class ScheduleError(ValueError):
    """Schedules or plans that do not work: ranks wait for each other, or compute something twice, too early or not at all."""


# --- schedules ---


def one_forward_one_backward(pp: int, pp_rank: int, num_microbatches: int) -> list[Action]:
    """1F1B, for any number of micro batches."""
    warmup = min(pp - pp_rank - 1, num_microbatches)
    forwards = [Action("forward", 0, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Action("backward", 0, microbatch) for microbatch in range(num_microbatches)]
    return _one_by_one(forwards, backwards, warmup)


def interleaved(pp: int, pp_rank: int, num_microbatches: int, vpp: int) -> list[Action]:
    """The interleaved schedule in Megatron's order: micro batches go through a rank's chunks in groups of pp.

    Raises:
        ValueError: pp does not divide the number of micro batches.
    """
    if num_microbatches % pp:
        below = num_microbatches // pp * pp
        legal = ", ".join(str(number) for number in (below, below + pp) if number)
        raise ValueError(
            f"num_microbatches={num_microbatches} is not a multiple of pp={pp}, as the interleaved schedule (vpp={vpp}) needs. "
            f"Nearest legal: {legal}; any number is legal with vpp=1"
        )
    warmup = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp, num_microbatches * vpp)
    forwards = _forwards_in_groups(pp, num_microbatches, vpp)
    backwards = [Action("backward", vpp - 1 - action.chunk, action.microbatch) for action in forwards]
    return _one_by_one(forwards, backwards, warmup)


def schedule(pp: int, vpp: int, pp_rank: int, num_microbatches: int, *, forward_only: bool = False) -> list[Action]:
    """What a rank computes in a step, or in an evaluation (`forward_only`), in order.

    Raises:
        ValueError: the numbers do not fit together; the message names the legal ones.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches} must be at least 1")
    if vpp > 1 and pp == 1:
        raise ValueError(f"vpp={vpp} needs pp of at least 2: virtual stages shorten the bubble of a pipeline")
    if forward_only:
        return _forwards_in_groups(pp, num_microbatches, vpp)
    if vpp == 1:
        return one_forward_one_backward(pp, pp_rank, num_microbatches)
    return interleaved(pp, pp_rank, num_microbatches, vpp)


def _forwards_in_groups(pp: int, num_microbatches: int, vpp: int) -> list[Action]:
    """All forward passes of a rank: pp micro batches through its first chunk, the same through its next chunk, …"""
    return [
        Action("forward", chunk, microbatch)
        for first in range(0, num_microbatches, pp)
        for chunk in range(vpp)
        for microbatch in range(first, min(first + pp, num_microbatches))
    ]


def _one_by_one(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forward passes, then a forward and a backward pass in turn, then the backward passes that are left."""
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return [*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :]]


# --- messages ---


def successor(pp: int, vpp: int, pp_rank: int, action: Action) -> tuple[int, Action] | None:
    """(rank, action) that needs what an action results in; None: nobody does."""
    towards = 1 if action.kind == "forward" else -1
    chunk, rank = divmod(action.chunk * pp + pp_rank + towards, pp)
    return (rank, Action(action.kind, chunk, action.microbatch)) if 0 <= chunk < vpp else None


def predecessor(pp: int, vpp: int, pp_rank: int, action: Action) -> tuple[int, Action] | None:
    """(rank, action) that results in what an action needs; None: it needs tokens, or the loss of its own forward pass."""
    towards = 1 if action.kind == "backward" else -1
    chunk, rank = divmod(action.chunk * pp + pp_rank + towards, pp)
    return (rank, Action(action.kind, chunk, action.microbatch)) if 0 <= chunk < vpp else None


def plan(schedules: Sequence[Sequence[Action]], vpp: int) -> list[list[Step]]:
    """The schedules of all pp ranks, in the order of ranks, with the messages between their actions.

    Raises:
        ScheduleError: they wait for each other; the message says who for what.
    """
    pp = len(schedules)
    steps: list[list[Step]] = [[] for _ in schedules]
    position = [0] * pp
    running: dict[int, tuple[int, Action]] = {}  # rank -> the tick at which its action ends
    arrived: set[tuple[int, Action]] = set()  # (rank, action) whose input is there
    for tick in count():
        finished = {rank: action for rank, (end, action) in sorted(running.items()) if end == tick}
        sends: dict[int, int] = {}
        receives: dict[int, list[Receive]] = {}
        for rank, action in finished.items():
            del running[rank]
            if (following := successor(pp, vpp, rank, action)) is not None:
                arrived.add(following)
                sends[rank], needed_by = following
                receives.setdefault(sends[rank], []).append(Receive(rank, needed_by))
        for rank in sorted(finished.keys() | receives.keys()):
            steps[rank].append(Step(finished.get(rank), sends.get(rank), tuple(receives.get(rank, ()))))
        for rank, actions in enumerate(schedules):
            if rank not in running and position[rank] < len(actions):
                action = actions[position[rank]]
                if predecessor(pp, vpp, rank, action) is None or (rank, action) in arrived:
                    running[rank] = tick + TICKS[action.kind], action
                    position[rank] += 1
        if not running:
            break
    waiting = [(rank, actions[position[rank]]) for rank, actions in enumerate(schedules) if position[rank] < len(actions)]
    if waiting:
        raise ScheduleError(
            "ranks wait for each other: " + "; ".join(_waiting(pp, vpp, rank, action) for rank, action in waiting)
        )
    return steps


@lru_cache(maxsize=16)  # pure, and the same in every step; a batch-size ramp-up goes through a few
def rank_plan(pp: int, vpp: int, pp_rank: int, num_microbatches: int, *, forward_only: bool = False) -> tuple[Step, ...]:
    """What a rank computes and exchanges in a step, or in an evaluation (`forward_only`).

    Raises:
        ValueError: the numbers do not fit together; the message names the legal ones.
    """
    schedules = [schedule(pp, vpp, rank, num_microbatches, forward_only=forward_only) for rank in range(pp)]
    return tuple(plan(schedules, vpp)[pp_rank])


def _waiting(pp: int, vpp: int, rank: int, action: Action) -> str:
    needed = predecessor(pp, vpp, rank, action)
    assert needed is not None  # an action that needs nothing is computed when it is its turn
    return f"rank {rank} with {action} for {needed[1]} on rank {needed[0]}"


# --- simulation ---


@dataclass(frozen=True)
class Simulation:
    """What a plan costs when messages take no time."""

    total_time: float
    bubble: float  # the part of total_time, averaged over the ranks, in which they wait
    in_flight: tuple[int, ...]  # by rank: activations that it holds at most, counted in micro batches × chunks


def simulate(
    plans: Sequence[Sequence[Step]],
    vpp: int,
    num_microbatches: int,
    *,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    forward_only: bool = False,
) -> Simulation:
    """Run the plans of all pp ranks without any processes, as `parallel.pipeline` does with them.

    A pass begins when the exchange with its input has ended. A rank posts an exchange after the step's pass, and when its
    previous exchange has ended; an exchange ends when all partners have posted theirs.

    Args:
        plans: by rank.
        vpp: chunks of each rank.
        num_microbatches: of the step.
        forward_time: of a micro batch through all chunks of a rank.
        backward_time: likewise.
        forward_only: the plans are those of an evaluation.

    Raises:
        ScheduleError: an action is missing, comes twice or before what it needs on its own rank; messages that meet are not the
            same; or ranks wait for each other, and then the message says who for whom.
    """
    in_flight = tuple(
        _check_actions(rank, [step.action for step in steps if step.action is not None], vpp, num_microbatches, forward_only)
        for rank, steps in enumerate(plans)
    )
    wire = _Wire(len(plans), vpp)
    times = {"forward": forward_time / vpp, "backward": backward_time / vpp}
    walks = [_walk(rank, steps, wire, times) for rank, steps in enumerate(plans)]
    waits_for = {rank: next(walk) for rank, walk in enumerate(walks)}
    total = 0.0
    while waits_for:
        goes_on = [rank for rank, messages in waits_for.items() if wire.end(messages) is not None]
        if not goes_on:
            raise ScheduleError("ranks wait for each other: " + "; ".join(map(wire.describe, waits_for, waits_for.values())))
        for rank in goes_on:
            end = wire.end(waits_for[rank])
            assert end is not None
            try:
                waits_for[rank] = walks[rank].send(end)
            except StopIteration as last:
                total = max(total, last.value)
                del waits_for[rank]
    busy = num_microbatches * (forward_time + (0.0 if forward_only else backward_time))
    return Simulation(total_time=total, bubble=(total - busy) / total, in_flight=in_flight)


def _check_actions(rank: int, actions: Sequence[Action], vpp: int, num_microbatches: int, forward_only: bool) -> int:
    """Each action once and none before its forward pass. Returns the most activations that are held at a time."""
    done: set[Action] = set()
    held = most = 0
    for action in actions:
        if action in done:
            raise ScheduleError(f"rank {rank} computes {action} twice")
        done.add(action)
        if action.kind == "forward":
            held += 1
            most = max(most, held)
        elif Action("forward", action.chunk, action.microbatch) in done:
            held -= 1
        else:
            raise ScheduleError(f"rank {rank} computes {action} before its forward pass")
    kinds: list[Literal["forward", "backward"]] = ["forward"] if forward_only else ["forward", "backward"]
    wanted = {Action(kind, chunk, m) for kind in kinds for chunk in range(vpp) for m in range(num_microbatches)}
    for action in sorted(wanted ^ done, key=str):
        raise ScheduleError(f"rank {rank} {'never computes' if action in wanted else 'has no need to compute'} {action}")
    return 0 if forward_only else most


Message = tuple[int, int, int]  # sender, receiver, and n for the n-th between the two


class _Wire:
    """All messages: the n-th that is sent from a to b is the n-th that b receives from a."""

    def __init__(self, pp: int, vpp: int) -> None:
        self.pp, self.vpp = pp, vpp
        # (sender, receiver, whether it is the sender who posted) -> when, and for which action of the receiver
        self._posted: defaultdict[tuple[int, int, bool], list[tuple[float, Action]]] = defaultdict(list)

    def post(self, sender: int, receiver: int, action: Action, time: float, *, by_sender: bool) -> Message:
        """One side of a message: the input of the receiver's action."""
        mine, theirs = self._posted[sender, receiver, by_sender], self._posted[sender, receiver, not by_sender]
        mine.append((time, action))
        number = len(mine) - 1
        if number < len(theirs) and theirs[number][1] != action:
            sent, expected = (action, theirs[number][1]) if by_sender else (theirs[number][1], action)
            raise ScheduleError(f"rank {sender} sends the input of {sent}, but rank {receiver} expects that of {expected}")
        return sender, receiver, number

    def end(self, messages: Sequence[Message]) -> float | None:
        """When both sides have posted all of these; None: not yet. Nothing ends at the beginning."""
        if any(not self._is_posted(message, by_sender=side) for message in messages for side in (True, False)):
            return None
        return max((self._posted[a, b, side][number][0] for a, b, number in messages for side in (True, False)), default=0.0)

    def describe(self, rank: int, messages: Sequence[Message]) -> str:
        """Whom a rank waits for with these."""
        parts = []
        for message in messages:
            sender, receiver, number = message
            for side, other, verb in ((True, sender, "send"), (False, receiver, "receive")):
                if not self._is_posted(message, by_sender=side):
                    action = self._posted[sender, receiver, not side][number][1]
                    parts.append(f"rank {other} to {verb} the input of {action}")
        return f"rank {rank} for " + " and for ".join(parts)

    def _is_posted(self, message: Message, *, by_sender: bool) -> bool:
        sender, receiver, number = message
        return number < len(self._posted[sender, receiver, by_sender])


def _walk(
    rank: int, steps: Sequence[Step], wire: _Wire, times: Mapping[str, float]
) -> Generator[Sequence[Message], float, float]:
    """A rank's way through its plan, in the order of `parallel.pipeline`: yields what it waits for, is told when that ended.

    Returns when the rank has finished.
    """
    clock = 0.0
    under_way: list[Message] = []  # the last exchange
    inbox: dict[Action, list[Message]] = {}  # action -> the exchange with its input
    for step in steps:
        if step.action is not None:
            if predecessor(wire.pp, wire.vpp, rank, step.action) is not None:
                if step.action not in inbox:
                    raise ScheduleError(f"rank {rank} never receives the input of {step.action}")
                clock = max(clock, (yield inbox.pop(step.action)))
            clock += times[step.action.kind]
        following = successor(wire.pp, wire.vpp, rank, step.action) if step.action is not None else None
        if (following and following[0]) != step.send:
            raise ScheduleError(f"rank {rank} sends what {step.action or 'no pass'} results in to rank {step.send}")
        if step.has_exchange:
            clock = max(clock, (yield under_way))
            under_way = []
            if following is not None:
                under_way.append(wire.post(rank, *following, clock, by_sender=True))
            for receive in step.receives:
                under_way.append(wire.post(receive.source, rank, receive.action, clock, by_sender=False))
                inbox[receive.action] = under_way
    return max(clock, (yield under_way))
