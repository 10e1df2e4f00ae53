"""Turns of stages: whose GPUs each waits for."""

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stages import changed

from flows.records import locks
from flows.records.run_record import LiveRecord, NodeState, RunFolder, RunRecord, now
from flows.running import turns
from stages.contracts import launch_settings
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
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    asked = changed(tmp_path, launch={"gpus": "device=0", **launch}, layout={"tp": 2})
    run: Any = SimpleNamespace(
        config=asked, workspace=tmp_path, stop=threading.Event(),
        folder=RunFolder(tmp_path, "brisk-otter"), refresh=frozenset(), fresh=False,
    )  # fmt: skip
    settings: dict[str, Any] = {"settings": {"steps": 1}} if node == "train" else {}
    spec = SPECS[node].model_validate({"workspace": str(tmp_path), **settings})
    with turns.in_turn(run, spec):
        assert {file.name for file in (tmp_path / "machine").iterdir()} == taken


@pytest.mark.parametrize(("state", "is_made"), [("running", True), ("cached", False), ("ran", False), ("waiting", False)])
def test_who_makes_a_result(tmp_path: Path, state: NodeState, is_made: bool) -> None:
    """Not every run that has it: what a process that was killed has set aside would stay there."""
    spec = SPECS["train"].model_validate({"workspace": str(tmp_path), "settings": {"steps": 1}})
    folder = RunFolder(tmp_path, "calm-heron")
    folder.path.mkdir(parents=True)
    with folder.held():
        record = RunRecord(name="calm-heron", config={}, cwd="/", pid=os.getpid(), started=now())
        LiveRecord(folder, record).node("train", state=state, key=spec.key)
        run: Any = SimpleNamespace(workspace=tmp_path, folder=RunFolder(tmp_path, "brisk-otter"))
        assert turns._maker(run, spec) == ("run calm-heron" if is_made else None)
        run.folder = folder
        assert turns._maker(run, spec) is None, "that is the run itself"
