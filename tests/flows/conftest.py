"""One real Prefect server for all tests here: our own, in a workspace of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A local server as `finetune run` starts it."""
    workspace: Path = tmp_path_factory.mktemp("server")
    with serving(workspace, say=lambda text: None) as server:
        yield server
