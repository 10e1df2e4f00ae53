"""A push to a Hub on loopback, over plain HTTP and over Xet: what lies there afterwards, under which branch and tag."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hf_xet
import pytest
from hub_server import HubServer
from push_inputs import (
    CURVE,
    FILES,
    READ_TOKEN,
    TOKEN,
    WEIGHTS,
    WITH_CHART,
    done,
    push_inputs,
    push_spec,
    refused,
    run,
    sha256,
)

from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings
from stages.contracts.specs import DownloadModelSpec, Ref

WAYS = pytest.mark.parametrize("xet", [False, True], ids=["http", "xet"])


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Ref]:
    return push_inputs(tmp_path / "ws")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users |= {TOKEN: "ada", READ_TOKEN: "ada"}
        server.readers.add(READ_TOKEN)
        yield server


@WAYS
def test_hub(tmp_path: Path, hub: HubServer, xet: bool) -> None:
    hub.xet = xet
    inputs = push_inputs(tmp_path / "ws", curve=CURVE)
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1.0", commit_message="First light")
    artifact = done(spec, hub, TOKEN, xet=xet)
    repo = hub.repos["models", "ada/fine"]
    assert repo.private
    assert repo.messages == ["", "First light"], "one commit, besides that of the new repo"
    assert set(repo.head) == {*WITH_CHART, ".gitattributes"}
    assert repo.head["model.safetensors"].sha256 == sha256(WEIGHTS)
    assert repo.head["README.md"].content == (spec.folder / "README.md").read_bytes()
    assert b'from_pretrained("ada/fine", revision="v1.0")' in (spec.folder / "README.md").read_bytes()
    assert artifact.commit == repo.branches["main"] == repo.tags["v1.0"]
    assert (artifact.target, artifact.branch, artifact.tag) == (f"{hub.url}/ada/fine", "main", "v1.0")
    assert artifact.figure == f"5 files, 1.3 MB at {hub.url}/ada/fine, tag v1.0 (private), digests equal"
    assert not (tmp_path / "ws/.cache/push").exists() or not list((tmp_path / "ws/.cache/push").iterdir())
    if xet:
        stored = sum(p.stat().st_size for p in (hub.folder / "xet").rglob("*") if p.is_file())
        assert stored > 0.9 * len(WEIGHTS), "the weights went through the Hub's own storage"
    else:
        assert hub.uploads[sha256(WEIGHTS)] == WEIGHTS
        assert all("authorization" not in request.headers for request in hub.asked("PUT", "/upload/"))


@WAYS
def test_what_was_pushed_downloads(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer, xet: bool) -> None:
    hub.xet = xet
    if xet:  # the real Hub's storage knows the Xet hash of what was uploaded; this one must be told
        [pushed] = hf_xet.hash_files([str(tmp_path / "ws/ExportArtifact/model/model.safetensors")])
        hub.xet_hashes[sha256(WEIGHTS)] = pushed.hash
    done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN, xet=xet)
    spec = DownloadModelSpec(workspace=str(tmp_path / "ws"), model=ModelSettings(source="ada/fine"))
    code, out, err = run(spec, hub, TOKEN, stage="download", xet=xet)
    assert code == 0, out + err
    assert (spec.folder / "files/model.safetensors").read_bytes() == WEIGHTS
    assert bool(hub.asked("GET", "/storage/")) != xet
    artifact = a.load_artifact(spec.folder)
    assert isinstance(artifact, a.ModelArtifact)
    assert artifact.license == "llama2", "the licence is carried over"


def test_a_push_that_is_done_again_changes_nothing(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1.0")
    first = done(spec, hub, TOKEN)
    assert done(spec, hub, TOKEN).commit == first.commit
    untagged = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag=None)
    assert len(hub.repos["models", "ada/fine"].commits) == 2
    card_changes = done(untagged, hub, TOKEN)  # it names no tag
    assert card_changes.commit != first.commit
    assert hub.received[sha256(WEIGHTS)] == len(WEIGHTS), "weights that are there are not sent again"
    assert hub.repos["models", "ada/fine"].tags == {"v1.0": first.commit}


def test_what_an_earlier_push_left_does_not_stay(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": "{}", "tokenizer.model": b"old",
        "chat_template.jinja": "old", "adapter_config.json": "{}", "notes.md": "mine", "images/me.png": b"mine",
    }  # fmt: skip
    hub.add("ada/fine", old | {".gitattributes": ""}, private=True)
    done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN)
    repo = hub.repos["models", "ada/fine"]
    assert set(repo.head) == {*FILES, ".gitattributes", "notes.md", "images/me.png"}
    assert len(repo.commits) == 2, "deleted by the commit that publishes"


def test_a_branch_is_made(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    repo = hub.add("ada/fine", {".gitattributes": "", "config.json": "{}"}, private=True)
    before = repo.branches["main"]
    artifact = done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", branch="next/one", tag="v1"), hub, TOKEN)
    assert repo.branches == {"main": before, "next/one": artifact.commit}
    assert repo.files("next/one")["config.json"].content == FILES["config.json"]
    assert repo.tags == {"v1": artifact.commit}
    card = repo.files("next/one")["README.md"].content
    assert isinstance(card, bytes)
    assert b'revision="v1"' in card


def test_a_tag_that_is_elsewhere_is_told_before_anything_is_sent(
    tmp_path: Path, inputs: dict[str, Ref], hub: HubServer
) -> None:
    repo = hub.add("ada/fine", {"config.json": "{}"}, private=True)
    repo.tags["v1"] = repo.branches["main"]
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1"), hub, TOKEN)
    assert f"push.tag: ada/fine has the tag v1 at commit {repo.tags['v1'][:12]}, which is not what would be published" in error
    assert "Choose another push.tag, or delete that one at" in error
    assert not hub.uploads
    assert len(repo.commits) == 1
    repo.branches["v2"] = repo.branches["main"]
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v2"), hub, TOKEN)
    assert "push.tag: v2 is a branch of ada/fine. Choose another name" in error
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", branch="v1"), hub, TOKEN)
    assert "push.branch: v1 is a tag of ada/fine. Choose another name" in error


def test_refusals(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine")
    error = refused(spec, hub)
    assert "push.to=hub needs a token: set the environment variable HF_TOKEN to one with the role write from" in error
    assert "the Hub does not accept this token (401)" in refused(spec, hub, "hf_wrongSECRET")
    for repo in (spec, push_spec(tmp_path, inputs, to="hub", repo="meta/fine")):
        error = refused(repo, hub, READ_TOKEN if repo is spec else TOKEN)
        assert f"the account of this token may not do that with {repo.settings.repo} (403)" in error
        assert "Use a token with the right to (role write, to publish)" in error
    hub.add("ada/fine", {".gitattributes": ""}, private=False)
    assert "push.private: ada/fine exists and is public. Make it private at" in refused(spec, hub, TOKEN)
    assert "cannot reach the Hub at http://127.0.0.1:9 for ada/fine" in refused(spec, None, TOKEN)


def test_no_right_to_write_is_told_before_the_weights_are_sent(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    repo = hub.add("ada/fine", {".gitattributes": ""}, private=True)
    repo.protected.add("main")
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN)
    assert "may not do that with ada/fine (403): Branch main is protected" in error
    assert "choose another push.branch or push.repo" in error
    assert "(403)" in refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", branch="next"), hub, READ_TOKEN)
    assert not hub.uploads
    hub.xet, spec = True, push_spec(tmp_path, inputs, to="hub", repo="ada/fine", branch="next")
    hub.on_request = lambda method, path: repo.protected.add("next") if "/xet-write-token/" in path else None
    code, out, err = run(spec, hub, TOKEN, xet=True)  # the storage's client has words of its own for it
    assert (code, "the account of this token may not do that with ada/fine (403)" in err) == (2, True), out + err


def test_a_private_repo_stays_private(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    hub.add("ada/fine", {".gitattributes": ""}, private=True)
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", private=False)
    code, out, _ = run(spec, hub, TOKEN)
    assert code == 0
    assert "warning: ada/fine exists and is private, and stays so. Make it public at" in out
    assert a.load_artifact(spec.folder).figure.endswith("(private), digests equal")


def test_a_public_repo_when_asked_for(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    artifact = done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", private=False), hub, TOKEN)
    assert not hub.repos["models", "ada/fine"].private
    assert artifact.figure.endswith("(public), digests equal")


def test_an_upload_that_differs_is_no_success(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    hub.corrupt |= {"model.safetensors", "tokenizer.json"}
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1"), hub, TOKEN, code=3)
    assert "after the upload 2 of 4 files of" in error
    assert "are missing or differ from those here: model.safetensors, tokenizer.json. Do not use commit" in error
    assert not hub.repos["models", "ada/fine"].tags, "what differs gets no tag"


def test_what_xet_holds_is_compared_too(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    hub.xet_hashes[sha256(WEIGHTS)] = "0" * 64
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN, code=3)
    assert "after the upload 1 of 4 files of" in error
    assert "differ from those here: model.safetensors" in error


def test_somebody_else_pushes_in_the_meantime(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    repo = hub.add("ada/fine", {".gitattributes": ""}, private=True)

    def meddle(method: str, path: str) -> None:
        if method == "PUT" and len(repo.commits) == 1:
            repo.commit({**repo.head, "theirs.txt": replace(repo.head[".gitattributes"])}, "theirs")

    hub.on_request = meddle
    error = refused(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN)
    assert "somebody else has changed branch main of ada/fine in the meantime: look at" in error
    assert "then run again: what has arrived is not sent again" in error
    assert set(repo.head) == {".gitattributes", "theirs.txt"}
    done(push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), hub, TOKEN)
    assert set(repo.head) == {*FILES, ".gitattributes", "theirs.txt"}
    assert hub.received[sha256(WEIGHTS)] == len(WEIGHTS)
