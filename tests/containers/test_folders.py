"""Folders that a stage writes to, with real containers: for a user whom its image does not know, and for the Hub's caches."""

import os
from pathlib import Path

import pytest
from scripted import scripted

USER, GROUP, OTHER_GROUP = 12345, 12346, 12347

WRITES = """
import getpass, os, pathlib, pwd
try:
    print("known as", pwd.getpwuid(os.getuid()).pw_name)
except KeyError:
    print("not known")
import torch
for folder in (os.path.expanduser("~"), "/tmp", {workspace!r}):
    pathlib.Path(folder, "written").write_text("x")
print(getpass.getuser(), os.getuid(), os.getgid(), {group} in os.getgroups(), torch.ones(2).sum().item())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("home", ["/home/somebody", "/root"])  # the image has the second, and nobody else may enter it
def test_a_user_whom_the_image_does_not_know(workspace: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """As most people's are: libraries find a name and a home, and what is made is the person's."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "getuid", lambda: USER)
    monkeypatch.setattr(os, "getgid", lambda: GROUP)
    monkeypatch.setattr(os, "getgroups", lambda: [GROUP, OTHER_GROUP])
    os.chown(workspace, USER, GROUP)
    watched = scripted(workspace, WRITES.format(workspace=str(workspace), group=OTHER_GROUP))
    watched.run()
    assert watched.lines == ["not known", f"finetune {USER} {GROUP} True 2.0"]
    made = (workspace / "written").stat()
    assert (made.st_uid, made.st_gid) == (USER, GROUP)


DOWNLOADS = """
import pathlib, huggingface_hub as hub
from huggingface_hub import constants
print(constants.HF_HUB_CACHE, constants.HF_HOME, hub.get_token())
pathlib.Path(constants.HF_HUB_CACHE, "model").write_text("weights")
print(sorted(str(path) for path in pathlib.Path("/caches").rglob("*")), pathlib.Path({home!r}).exists())
"""


def test_the_hub_s_caches_are_shown_and_not_the_token_beside_them(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "cache"
    home.mkdir()
    (home / "token").write_text("hf_averysecrettokenofsomebody")
    monkeypatch.setenv("HF_HOME", str(home))
    watched = scripted(workspace, DOWNLOADS.format(home=str(home)), node="download-model")
    watched.run()
    caches = Path("/caches/huggingface")
    shown = [str(path) for path in (caches, caches / "datasets", caches / "hub", caches / "hub" / "model")]
    assert watched.lines == [f"{caches / 'hub'} /tmp/.cache/huggingface None", f"{shown} False"]
    assert (home / "hub" / "model").read_text() == "weights"
