"""What tests of several parts share."""

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed import GlooPool
from xdist.scheduler import LoadFileScheduling

from flows.server.local import Server, serving

# A thread per process, also of those that tests start. Where there are more threads than cores, OpenMP's wait for each other
# in loops: tests then took five times the cores' time. Torch is imported after this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]

# Files of half a minute and more. They begin first, so that none is left alone at the end when files run side by side.
LONG = (
    "test_end_to_end",
    "test_serve",
    "test_parallel",
    "test_command",
    "test_flow",
    "test_train",
    "test_ui",
    "test_server",
    "test_download",
    "test_trainer_resume",
    "test_trainer_golden",
)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, before anything asks for one, from all tests but those that need them or ask an engine for them.

    The others start more processes than there are GPUs, and want the same bits each time.
    """
    if not re.search(r"(?<!not )\b(gpu|docker)\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Files are shared out whole; those with tests of many ranks go to one of those who test side by side.

    Ranks that wait for each other take the cores' time: twice as many of them take more than twice of it.
    """
    return _RanksTogether(config, log) if config.getvalue("dist") == "loadfile" else None


class _RanksTogether(LoadFileScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "ranks" if _has_ranks(file) else file


@cache
def _has_ranks(file: str) -> bool:
    return "GlooPool" in (ROOT / file).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def same_folder() -> Iterator[None]:
    """`finetune rerun` goes to the folder of its run; the next test is to be where it would be alone."""
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    """Processes that run a function together: `pool.run(fn, world_size, *args)`; see tests/distributed.py."""
    gloo = GlooPool()
    yield gloo
    gloo.close()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both kinds of tokenizer, which nobody changes."""
    # Here, for torch must not come before OMP_NUM_THREADS is set.
    from tiny_tokenizers import train_huggingface, train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(folder)
    train_huggingface(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A local server as `finetune run` starts it, in a workspace of its own; one for all who test side by side."""
    with serving(_shared(tmp_path_factory), say=lambda text: None) as server:
        yield server


@pytest.fixture(scope="session")
def put_database(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Gives a workspace a database for its server: to set up a new one takes that longer than to start."""

    def put(workspace: Path) -> None:
        home = workspace / "prefect"
        home.mkdir(parents=True)
        source = _shared(tmp_path_factory) / "prefect" / "prefect.db"
        with closing(sqlite3.connect(source)) as ours, closing(sqlite3.connect(home / "prefect.db")) as copy:
            ours.backup(copy)

    return put


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "server"
