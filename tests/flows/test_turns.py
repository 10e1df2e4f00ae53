"""Turns of stages: whose GPUs each waits for."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_launch_docker import config

from flows.launch import choose
from flows.records import locks
from flows.records.run_record import RunFolder
from flows.running import turns
from stages.contracts.specs import SPECS

HOSTS = {"hosts": ["ssh://gpu2", "ssh://gpu1"]}


@pytest.mark.parametrize(
    ("launch", "node", "taken"),
    [
        (HOSTS, "train", {"gpus@gpu1", "gpu-0@gpu1", "gpus@gpu2", "gpu-0@gpu2"}),
        (HOSTS, "verify", {"gpus@gpu2", "gpu-0@gpu2"}),  # the first has all of it
        ({"by": "docker"}, "train", {"gpus", "gpu-0"}),
        ({"by": "process"}, "train", {"gpus", "gpu-0"}),
    ],
)
def test_a_stage_takes_the_gpus_of_its_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, Any], node: str, taken: set[str]
) -> None:
    monkeypatch.setattr(locks, "MACHINE", tmp_path / "machine")
    monkeypatch.setattr(turns, "get_run_logger", lambda: logging.getLogger("turns"))
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: True)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    run: Any = SimpleNamespace(
        config=config(tmp_path, {"gpus": "device=0", **launch}, layout={"tp": 2}), workspace=tmp_path, stop=threading.Event(),
        folder=RunFolder(tmp_path, "brisk-otter"), refresh=frozenset(), fresh=False,
    )  # fmt: skip
    settings: dict[str, Any] = {"settings": {"steps": 1}} if node == "train" else {}
    spec = SPECS[node].model_validate({"workspace": str(tmp_path), **settings})
    with turns.in_turn(run, spec):
        assert {file.name for file in (tmp_path / "machine").iterdir()} == taken
