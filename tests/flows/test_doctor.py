"""`finetune doctor` on a machine without an engine."""

from pathlib import Path

import pytest
from fake_stages import changed, config

from flows import cli
from flows.launch import docker_engine, doctor
from flows.launch.problems import NotReady, Problem
from stages.contracts import launch_settings
from stages.contracts.config import PipelineConfig


def findings(asked: PipelineConfig | None, **ours: str) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine(asked, ours)}


def test_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is missing where stages run as processes."""
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 0)
    monkeypatch.setattr(docker_engine, "default_host", lambda: f"unix://{tmp_path}/none")
    found = findings(config(tmp_path))
    assert found["stages"].text == "run as plain processes of this machine"
    assert found["gpus"].text == "none here: stages compute on the CPU"
    assert found["containers"].text.startswith(f"not used here, and could not be: no Docker engine answers at {tmp_path}/none")
    assert doctor.main(config(tmp_path)) == 0
    assert "✓ workspace" in capsys.readouterr().out


def test_a_layout_of_many_processes_on_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    monkeypatch.setattr(docker_engine, "default_host", lambda: f"unix://{tmp_path}/none")
    asked = changed(tmp_path, layout={"tp": 2, "dp": 4})
    assert findings(asked)["gpus"] == doctor.Finding("gpus", "none here: stages compute on the CPU, 8 at once")
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    asked = changed(tmp_path, launch={"by": "process", "gpus": "none"})
    assert findings(asked)["gpus"] == doctor.Finding("gpus", "not used: stages compute on the CPU")
    assert "gpus" not in findings(changed(tmp_path, launch={"by": "process"})), "they are used"


def test_a_workspace_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 0)
    file = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    for arguments in ([], [file]):
        assert cli.main(["doctor", *arguments, "--workspace", str(tmp_path / "elsewhere")]) == 0
        assert f"workspace   {tmp_path}/elsewhere: " in capsys.readouterr().out


def test_gpus_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    monkeypatch.setattr(docker_engine, "default_host", lambda: f"unix://{tmp_path}/none")
    problem = findings(None)["containers"]
    assert problem.text.startswith("this machine has GPUs, but no Docker engine answers")
    assert problem.mend is not None
    assert doctor.main(config(tmp_path)) == 1
    assert "1 problem\n" in capsys.readouterr().err


def test_a_folder_that_no_container_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a configuration the folder that a person is in is looked at, which may be any."""
    monkeypatch.setattr(doctor, "decided", lambda settings: (settings.model_copy(update={"by": "docker"}), None))
    monkeypatch.chdir("/")
    problem = findings(None)["launch"]
    assert problem.text.startswith("the current folder: /, mounted in a container, would hide /bin of the container itself")
    assert problem.mend == "choose another"


def test_the_first_machine_needs_what_the_downloads_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    asked = changed(tmp_path / "w", launch={"hosts": ["ssh://gpu1", "ssh://gpu2"]}, layout={"tp": 2})
    first, second = (doctor._binds(asked, tmp_path / "w", host) for host in asked.launch.hosts)
    assert {bind.source for bind in first} == {tmp_path / "w", tmp_path / "home" / "hub", tmp_path / "home" / "datasets"}
    assert {bind.source for bind in second} == {tmp_path / "w"}
    assert list(tmp_path.iterdir()) == []  # it looks, and changes nothing


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
