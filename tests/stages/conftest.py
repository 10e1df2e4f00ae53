"""What tests of several stages share."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from download_runs import TOKEN
from hub_server import HubServer
from preprocess_runs import prepared

from megatron_core_impl.data.preprocessing import Job
from stages import preprocess
from stages.contracts.specs import PreprocessSpec


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users[TOKEN] = "ada"
        yield server


@pytest.fixture
def prepare(tmp_path: Path, tokenizers: Path) -> Callable[..., PreprocessSpec]:
    """Makes the results of download and gives the spec of preprocess."""
    return partial(prepared, tmp_path, tokenizers)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines per part, so that a small text has many."""
    monkeypatch.setattr(preprocess, "Job", partial(Job, part_bytes=300))
