"""What tests of several stages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from download_runs import TOKEN
from hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users[TOKEN] = "ada"
        yield server
