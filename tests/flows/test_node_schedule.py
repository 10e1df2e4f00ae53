"""When nodes begin: not before what they need is done, not after what they need has failed, and side by side otherwise."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from prefect.states import Completed, Failed

from flows.running.schedule import Node, Schedule


class Work:
    """Stands for Prefect's future: ends when it is told to."""

    def __init__(self) -> None:
        self.state: Any = None
        self.callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def wait(self) -> None:
        assert self.state is not None, "it has ended before anybody waits for it"

    def end(self, state: Any) -> None:
        self.state = state
        for callback in self.callbacks:
            callback(self)


class Nodes:
    """A schedule, and which of its nodes have begun, in this order."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.begun: dict[str, Work] = {}

    def add(self, name: str, *needs: Node[Any]) -> Node[Any]:
        def begin() -> Any:
            self.begun[name] = Work()
            return self.begun[name]

        return self.schedule.add(begin, needs)


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def test_each_begins_when_what_it_needs_is_done(nodes: Nodes) -> None:
    model, data = nodes.add("model"), nodes.add("data")
    convert, preprocess = nodes.add("convert", model), nodes.add("preprocess", model, data)
    verify = nodes.add("verify", convert, preprocess)
    nodes.add("train", verify)
    assert list(nodes.begun) == ["model", "data"]

    nodes.begun["model"].end(Completed())
    nodes.begun["data"].end(Failed())
    nodes.schedule._take()
    nodes.schedule._take()
    assert list(nodes.begun) == ["model", "data", "convert"]
    nodes.begun["convert"].end(Completed())
    nodes.schedule.run()
    assert list(nodes.begun) == ["model", "data", "convert"], "what needs the data never begins"
    assert [future.state.is_completed() for future in nodes.schedule.futures()] == [True, False, True]


def test_it_goes_on_to_the_end(nodes: Nodes) -> None:
    last = nodes.add("0")
    for number in range(1, 20):
        last = nodes.add(str(number), last)
    for number in range(20):
        Thread(target=lambda work=nodes.begun[str(number)]: work.end(Completed())).start()
        nodes.schedule._take()
    nodes.schedule.run()
    assert list(nodes.begun) == list(map(str, range(20)))


def test_nothing_to_do(nodes: Nodes) -> None:
    nodes.schedule.run()
    assert nodes.schedule.futures() == []
