"""The report where a browser gets it: among the files that the workspace's own Prefect server hands out.

A page of a server cannot link to a file of this machine, browsers refuse that. So a copy lies beside the files of the local
server's UI, under the id of the flow run, which nobody guesses. Prefect hands these files out without asking for a login: where
the server has one, and of a server elsewhere, only the file's path is told.
"""

import json
import shutil
from pathlib import Path

from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from flows.records.server_home import server_home
from flows.server.local import REPORTS, UI_ROOT


def serve_report(report: Path, workspace: Path, flow_run_id: str | None) -> str | None:
    """Put a report where the server of the workspace serves it.

    Returns:
        Its address there; None where the run is not shown on that server, or not to everybody.
    """
    home = server_home(workspace)
    ui = home / UI_ROOT
    if flow_run_id is None or not ui.is_dir() or not _is_used(home) or PREFECT_API_AUTH_STRING.value():
        return None
    target = ui / REPORTS / f"{flow_run_id}.html"
    target.parent.mkdir(exist_ok=True)
    draft = target.with_suffix(".new")
    shutil.copyfile(report, draft)
    draft.replace(target)
    return f"/{REPORTS}/{target.name}"


def _is_used(home: Path) -> bool:
    """Whether the workspace's server is the one that this process talks to."""
    try:
        return bool(json.loads((home / "server.json").read_bytes())["api"] == PREFECT_API_URL.value())
    except (OSError, ValueError, KeyError, TypeError):
        return False
