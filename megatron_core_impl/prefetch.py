"""Work that is done before it is asked for, by a thread beside the one that needs it."""

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

T = TypeVar("T")


class _Made(NamedTuple, Generic[T]):
    """What became of asking the iterator once. Neither: it has ended."""

    item: T | None = None
    error: BaseException | None = None


class Prefetched(Generic[T]):
    """The items of an iterator, in order, at most `ahead` of them made before they are asked for.

    The iterator runs in a thread, which ends with it, with its first error, or when this context is left. An error is raised
    where the item is asked for, after those made before it.
    """

    def __init__(self, items: Iterator[T], ahead: int = 2) -> None:
        self.waited = 0.0  # seconds, by whoever asked
        self._items = items
        self._room = threading.Semaphore(ahead)
        self._made: SimpleQueue[_Made[T]] = SimpleQueue()
        self._is_closed = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            self._room.acquire()
            if self._is_closed:
                return
            try:
                made = _Made(next(self._items))
            except StopIteration:
                self._made.put(_Made())
                return
            except BaseException as error:
                self._made.put(_Made(error=error))
                return
            self._made.put(made)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._has_ended:
            raise StopIteration
        started = time.perf_counter()
        made = self._made.get()
        self.waited += time.perf_counter() - started
        if made.item is None:
            self._has_ended = True
            raise made.error or StopIteration
        self._room.release()
        return made.item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closed = True
        self._room.release()
        self._thread.join()
