"""`finetune doctor` on a machine without an engine."""

from pathlib import Path

import pytest
from fake_stages import config

from flows.launch import choose, docker_engine, doctor
from flows.launch.docker_engine import NotReady, Problem
from stages.contracts.config import PipelineConfig


def changed(workspace: Path, **sections: object) -> PipelineConfig:
    return PipelineConfig.model_validate(config(workspace).model_dump(mode="json") | sections)


def findings(asked: PipelineConfig | None, **ours: str) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine(asked, ours)}


def test_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is missing where stages run as processes."""
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: False)
    monkeypatch.setattr(doctor, "machine_has_gpus", lambda: False)
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 0)
    monkeypatch.setattr(docker_engine, "default_host", lambda: f"unix://{tmp_path}/none")
    found = findings(config(tmp_path))
    assert found["stages"].text == "run as plain processes of this machine"
    assert found["containers"].text.startswith(f"not used here, and could not be: no Docker engine answers at {tmp_path}/none")
    assert doctor.main(config(tmp_path)) == 0
    assert "✓ workspace" in capsys.readouterr().out


def test_gpus_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: True)
    monkeypatch.setattr(doctor, "machine_has_gpus", lambda: True)
    monkeypatch.setattr(docker_engine, "default_host", lambda: f"unix://{tmp_path}/none")
    problem = findings(None)["containers"]
    assert problem.text.startswith("this machine has GPUs, but no Docker engine answers")
    assert problem.mend is not None
    assert doctor.main(config(tmp_path)) == 1
    assert "1 problem\n" in capsys.readouterr().err


def test_what_a_job_needs_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = {"to": "hub", "repo": "me/mine"}
    asked = changed(tmp_path, push=push, launch={"by": "process"})
    assert findings(asked)["token"].mend == "export HF_TOKEN=… (one that may write to me/mine)"
    assert findings(asked, HF_TOKEN="x")["token"].mend is None
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1 << 60)
    assert findings(asked)["workspace"].mend == "make room, or set workspace to a larger disk"
    (tmp_path / "file").touch()
    told = findings(changed(tmp_path / "file" / "w", launch={"by": "process"}))["workspace"]
    assert f"{tmp_path}/file cannot be written to" in told.text


def test_a_problem_is_told_with_what_mends_it() -> None:
    error = NotReady(Problem("no engine", "start it"), Problem("no image", "build it"))
    assert str(error) == "no engine. To mend it: start it; no image. To mend it: build it"
    assert doctor.Finding("engine", "no engine", "start it").lines(8) == "✗ engine    no engine\n            → start it"
