"""Where something that must be nowhere could be seen: the list of processes, files, and what Prefect's API tells."""

import contextlib
import json
import urllib.request
from pathlib import Path
from typing import Any

PAGE = 200  # the most that Prefect's API hands out at once
KINDS = ("flow_runs", "task_runs", "logs", "artifacts", "events")


def in_command_lines(text: str) -> list[bytes]:
    """The command lines of this machine's processes, those in containers too, that have it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(file.read_bytes())
    return [line for line in found if text.encode() in line]


def in_files(text: str, *folders: Path) -> list[Path]:
    """The files below these folders that have it."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [file for file in files if text.encode() in file.read_bytes()]


def told_by(api: str) -> dict[str, list[Any]]:
    """Everything that a server's API has, by kind; of events, the newest."""
    return {kind: _rows(api, kind) for kind in KINDS}


def home_of(api: str) -> Path:
    """Where a server keeps its database."""
    with urllib.request.urlopen(f"{api}/admin/settings", timeout=30) as response:
        return Path(json.loads(response.read())["home"])


def _rows(api: str, kind: str) -> list[Any]:
    rows: list[Any] = []
    while True:
        page = b"{}" if kind == "events" else json.dumps({"limit": PAGE, "offset": len(rows)}).encode()
        asked = urllib.request.Request(f"{api}/{kind}/filter", data=page, headers={"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as response:
            told = json.loads(response.read())
        rows += told["events"] if kind == "events" else told
        if kind == "events" or len(told) < PAGE:
            return rows
