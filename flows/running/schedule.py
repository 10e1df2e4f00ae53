"""Which node begins when: each as soon as what it needs is done, and not before.

Prefect would take all tasks at once and let them wait inside. But a task that waits stands in the graph of the run from the
beginning, under a name that Prefect makes up, and one that is never reached looks there as if it had been. So a node is given
to Prefect when it can begin; the graph then shows the run as it goes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from prefect.futures import PrefectFuture

A = TypeVar("A")


@dataclass(eq=False)
class Node(Generic[A]):
    """Work that is to be done once other nodes are."""

    begin: Callable[[], PrefectFuture[A]]
    needs: Sequence["Node[Any]"]
    future: PrefectFuture[A] | None = None  # None: it has not begun
    is_done: bool = False  # well


class Schedule:
    """The nodes of a run. They begin in the thread that calls, which must be the flow's."""

    def __init__(self) -> None:
        self._nodes: list[Node[Any]] = []
        self._running = 0
        self._ended: SimpleQueue[Node[Any]] = SimpleQueue()

    def add(self, begin: Callable[[], PrefectFuture[A]], needs: Sequence[Node[Any]]) -> Node[A]:
        """A node; it begins now if it can, else during `run`."""
        node = Node(begin, needs)
        self._nodes.append(node)
        self._begin_what_can()
        return node

    def run(self) -> None:
        """Until nothing runs, and nothing can begin. What depends on a node that failed never begins."""
        while self._running:
            self._take()

    def futures(self) -> list[PrefectFuture[Any]]:
        """Of the nodes that have begun, in their order."""
        return [node.future for node in self._nodes if node.future is not None]

    def _take(self) -> None:
        """Wait until one ends."""
        node = self._ended.get()
        assert node.future is not None
        node.future.wait()  # returns at once, and from now on it knows its state
        node.is_done = node.future.state.is_completed()
        self._running -= 1
        self._begin_what_can()

    def _begin_what_can(self) -> None:
        for node in self._nodes:
            if node.future is None and all(need.is_done for need in node.needs):
                node.future = node.begin()
                self._running += 1
                node.future.add_done_callback(lambda future, node=node: self._ended.put(node))  # type: ignore[misc]
