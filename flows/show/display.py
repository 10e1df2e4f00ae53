"""A run as it looks in a terminal: one line per node, live where there is a terminal, as plain lines where there is none.

It watches the run's record on disk and knows nothing of how the run is done.
"""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flows.records.run_record import NodeRecord, RunFolder, RunRecord, now
from flows.records.story import flow_of
from stages.contracts.specs import SPECS
from stages.contracts.words import brief, plain, seconds

WIDTH = max(map(len, SPECS))
MARKS = {"ran": ("✓", "green"), "cached": ("✓", "cyan"), "failed": ("✗", "red"), "stopped": ("■", "yellow")}
BAR = 16  # characters


def node_text(node: str, record: NodeRecord) -> Text:
    """The line of a node: mark, time or state, figure."""
    mark, style = MARKS.get(record.state, (" ", "dim"))
    if record.state == "running":
        mark, style = "·", "bold"
    took = seconds(record.wall_seconds) if record.wall_seconds is not None else ""
    state = {"cached": "cached", "waiting": "", "running": _running_for(record)}.get(record.state, took)
    text = Text(f"  {node:<{WIDTH}}  ", style="dim" if record.state == "waiting" else "")
    text.append(mark, style=style).append(f" {state:<7}  ", style="dim")
    if record.state == "running":
        if record.done is not None:
            full = round(BAR * record.done)
            text.append("▕" + "█" * full + " " * (BAR - full) + "▏ ", style="green")
        return text.append(plain(record.doing or ""))
    told = brief(record.error) if record.error else plain(record.figure or "")
    return text.append(told, style="red" if record.state == "failed" else "")


def _running_for(record: NodeRecord) -> str:
    return seconds((now() - record.started).total_seconds()) if record.started is not None else ""


def header(record: RunRecord) -> Text:
    """The first line of a run."""
    text = Text(flow_of(record), style="bold").append(" · run ").append(record.name, style="bold")
    return text.append(f" · {record.page}") if record.page else text


def server_is_off(name: str, option: str) -> str:
    """What to say of a page whose local server has ended. `option` as in `go_on`."""
    return f"UI:         its server ended with the run; finetune rerun {name}{option} --keep-server leaves it on"


class Display:
    """Shows a run while the `with` lasts. Safe to leave at any moment: the last state is printed on leaving."""

    PLAIN_SECONDS = 15.0  # between lines about the same running node, where there is no terminal

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.live: Live | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="display", daemon=True)
        self._seen: dict[str, str] = {}
        self._said: dict[str, float] = {}
        self._begun = now()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._show()
        if self.live is not None:
            self.live.stop()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self._show()

    def _show(self) -> None:
        record = self.folder.read()
        if record is None or record.started < self._begun:
            return  # not begun, or the record of an earlier attempt
        if self.live is not None:
            lines = [node_text(node, state) for node, state in record.nodes.items()]
            for line in lines:
                line.no_wrap, line.overflow = True, "ellipsis"
            self.live.update(Group(header(record), *lines), refresh=True)
            return
        if "header" not in self._seen:
            self._seen["header"] = record.name
            self._print(header(record))
        for node, state in record.nodes.items():
            if state.state == "running":
                due = time.monotonic() - self._said.setdefault(node, time.monotonic()) >= self.PLAIN_SECONDS
                if due and state.doing:
                    self._said[node] = time.monotonic()
                    self._print(node_text(node, state))
            elif state.state != "waiting" and self._seen.get(node) != state.state:
                self._seen[node] = state.state
                self._print(node_text(node, state))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)
