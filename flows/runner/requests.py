"""Being asked to stop: how often, by signals that the runs' processes are spared."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


class Requests:
    """How often the runner was asked to stop."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self.changed.set()


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """SIGTERM, and Ctrl-C, which the runs' processes are spared: a terminal sends it to them as well."""
    loop, requests, ended = asyncio.get_running_loop(), Requests(), threading.Event()
    resource_tracker.ensure_running()  # it would unblock what is blocked here
    # What is started from this thread inherits that Ctrl-C is blocked; another thread takes it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def take_interrupts() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ended.wait()

    thread = threading.Thread(target=take_interrupts, name="interrupts", daemon=True)
    thread.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, requests.add)
    try:
        yield requests
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        ended.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
