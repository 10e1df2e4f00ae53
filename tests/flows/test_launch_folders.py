"""Folders of this machine that refuse us: told with the setting that names them, and no defect of ours."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import SocketEngine
from fake_stages import changed

from flows.launch import doctor
from flows.launch.docker_checks import Image, look_around
from flows.launch.docker_mounts import binds_of, check_places, hidden_of, make_folders
from flows.launch.problems import NotReady
from stages.contracts.launch_settings import LaunchSettings
from stages.contracts.specs import DownloadDataSpec, PushSpec

MEND = "To mend it: change the owner or the mode of what is there, or choose another"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Whom permissions keep out, also where tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def shut() -> Iterator[Path]:
    """A folder that nobody may enter, in one that everybody may: pytest's own are for their owner."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shut = Path(folder) / "shut"
        shut.mkdir(mode=0o700)
        (shut / "link").symlink_to("/etc")
        shut.chmod(0)
        yield shut
        shut.chmod(0o700)


def refusal(call: Any) -> str:
    with pytest.raises(NotReady) as caught:
        call()
    return str(caught.value)


def test_a_workspace_that_cannot_be_written_to(tmp_path: Path, shut: Path) -> None:
    (tmp_path / "file").touch()

    def look(workspace: Path) -> None:
        image = Image("mine", "sha256:1", "sha256:1")
        look_around(SocketEngine(), "here", LaunchSettings(gpus="none"), image, [], {}, workspace=workspace, processes=1)

    below = tmp_path / "file" / "w"
    assert refusal(lambda: look(below)) == f"workspace: {below} cannot be written to (Not a directory). {MEND}"
    with nobody():
        told = refusal(lambda: look(shut / "w"))
    assert told == f"workspace: {shut}/w cannot be written to (Permission denied). {MEND}"
    assert refusal(lambda: hidden_of(below)) == f"workspace: {below}/prefect cannot be made (Not a directory). {MEND}"


def test_doctor_in_a_folder_that_one_may_not_enter(shut: Path) -> None:
    asked = changed(shut / "w", launch={"by": "process"})
    with nobody():
        (found,) = [finding for finding in doctor.examine(asked, {}) if finding.subject == "workspace"]
    assert found.text == f"{shut}/w: {shut} cannot be written to"
    assert found.mend is not None


def test_what_cannot_be_made(tmp_path: Path) -> None:
    """Before the stage starts: the caches of the Hub where their folder is somebody else's, the parent of a pushed folder."""
    workspace, file = tmp_path / "w", tmp_path / "file"
    file.touch()
    push = PushSpec.model_validate({"workspace": str(workspace), "settings": {"to": "folder", "folder": f"{file}/mine/model"}})
    assert refusal(lambda: make_folders(binds_of(push, {}))) == (
        f"the folder that push.folder is in: {file}/mine cannot be made (Not a directory). {MEND}"
    )
    data = DownloadDataSpec.of(changed(workspace))
    assert refusal(lambda: make_folders(binds_of(data, {"HF_HOME": str(file)}))) == (
        f"HF_DATASETS_CACHE: {file}/datasets cannot be made (Not a directory). {MEND}"
    )


def test_what_may_not_be_looked_at(tmp_path: Path, shut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is refused; of what is in one, download passes over what it may not read, and so does the look for links."""
    monkeypatch.chdir(shut.parent)  # where everybody may look for what may be a source here
    for section, key in (("model", "model.source"), ("data", "data.source")):
        asked = changed(tmp_path, **{section: {"source": str(shut / "text")}})
        with nobody():
            assert refusal(lambda asked=asked: check_places(asked)) == (
                f"{key}: {shut}/text cannot be read (Permission denied). {MEND}"
            )
    source, workspace = shut.parent / "text", shut.parent / "w"
    (source / "shut").mkdir(parents=True)
    (source / "shut").chmod(0)
    elsewhere = {shut.parent / f"{number}" for number in range(8)}
    for folder in elsewhere:  # before and after those that lead nowhere, in whichever order the disk has them
        folder.mkdir()
        (source / folder.name).symlink_to(folder)
        (source / f"not-{folder.name}").symlink_to(shut / "text")
    text = DownloadDataSpec.of(changed(workspace, data={"source": str(source)}))
    tokens = DownloadDataSpec.of(changed(workspace, data={"source": f"{shut}/text/corpus", "format": "tokenized"}))
    hub = DownloadDataSpec.of(changed(workspace))
    with nobody():
        assert {bind.source for bind in binds_of(text, {})} == {workspace, source, *elsewhere}
        told = refusal(lambda: binds_of(tokens, {}))
        told_of_certificates = refusal(lambda: binds_of(hub, {"SSL_CERT_FILE": f"{shut}/ca.pem"}))
    assert told == f"data.source: {shut}/text cannot be read (Permission denied). {MEND}"
    assert told_of_certificates == f"SSL_CERT_FILE: {shut}/ca.pem cannot be read (Permission denied). {MEND}"
