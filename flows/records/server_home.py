"""Where the local Prefect server of a workspace keeps what it has."""

from pathlib import Path


def server_home(workspace: Path) -> Path:
    """The folder of its database and of Prefect's results. Stages have no business there."""
    return workspace / "prefect"
