"""What the Docker launcher asks for and makes of what it hears, without an engine."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from engines import engine_of
from fake_stages import changed, make_results

from flows import cli
from flows.launch import choose
from flows.launch.docker import DockerLauncher, _machine
from flows.launch.docker_mounts import Bind, _without_doubles, binds_of, check_place, check_places, make_folders
from flows.launch.docker_request import Ask, Place, container_name, request
from flows.launch.problems import NotReady
from flows.launch.process import ProcessLauncher
from flows.records.run_record import RunFolder, RunRecord, now
from stages.contracts import launch_settings
from stages.contracts.launch_settings import Gpus, LaunchSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PushSpec, TrainSpec

NO_GPUS, ALONE = Gpus(), Place()


# Settings


@pytest.mark.parametrize(
    ("given", "visible", "has_gpus", "wanted"),
    [
        ("auto", None, True, Gpus(count=-1)),
        ("auto", None, False, Gpus()),
        ("all", None, False, Gpus(count=-1)),
        ("all", "2,3", True, Gpus(ids=("2", "3"))),
        ("auto", "", True, Gpus()),
        ("none", None, True, Gpus()),
        (0, None, True, Gpus()),
        (4, "2,3", True, Gpus(count=4)),
        ("device=0,GPU-3a", None, True, Gpus(ids=("0", "GPU-3a"))),
        ([1, 3], None, True, Gpus(ids=("1", "3"))),
    ],
)
def test_which_gpus(given: object, visible: str | None, has_gpus: bool, wanted: Gpus) -> None:
    settings = LaunchSettings.model_validate({"gpus": given})
    assert settings.wanted_gpus(visible=visible, has_gpus=has_gpus) == wanted


@pytest.mark.parametrize("gpus", ["auto", "all"])
def test_hosts_have_gpus_whatever_this_machine_has_and_shows(gpus: str) -> None:
    settings = LaunchSettings(hosts=("ssh://me@gpu1", "ssh://me@gpu2"), gpus=gpus)
    assert settings.wanted_gpus(visible="", has_gpus=False) == Gpus(count=-1)


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ({"gpus": "some"}, "'some' must be auto, all, none, a count such as 4, or device=0,1"),
        ({"hosts": ["gpu1"]}, "hosts: gpu1 must be unix:///PATH, ssh://USER@MACHINE or tcp://MACHINE:PORT"),
        ({"hosts": ["http://gpu1"]}, "hosts: http://gpu1 must be"),
        ({"hosts": ["ssh://-oProxyCommand=x@gpu1"]}, "hosts: ssh://-oProxyCommand=x@gpu1 must be"),  # an option of ssh
        ({"hosts": ["ssh://me@-oProxyCommand=x"]}, "hosts: ssh://me@-oProxyCommand=x must be"),
        ({"hosts": ["ssh://-oProxyCommand=x"]}, "hosts: ssh://-oProxyCommand=x must be"),
        ({"by": "process", "hosts": ["ssh://gpu1"]}, "by=process uses none: set by to docker, or leave hosts out"),
        ({"rendezvous": "gpu1"}, "rendezvous is where several hosts meet, and hosts names fewer than two: leave it out"),
        ({"hosts": ["ssh://gpu1", "ssh://gpu2"]}, "launch.hosts: 2 machines cannot share the 1 processes of layout"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, launch: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        changed(tmp_path, launch=launch)
    assert told in str(caught.value)


def test_which_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    assert isinstance(choose.launcher_for(changed(tmp_path)), ProcessLauncher)
    assert isinstance(choose.launcher_for(changed(tmp_path, launch={"by": "docker"})), DockerLauncher)
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    assert isinstance(choose.launcher_for(changed(tmp_path, launch={"hosts": ["ssh://gpu1"]})), DockerLauncher)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert isinstance(choose.launcher_for(changed(tmp_path)), ProcessLauncher)
    with engine_of(tmp_path / "docker.sock"):
        assert isinstance(choose.launcher_for(changed(tmp_path)), DockerLauncher)
        assert isinstance(choose.launcher_for(changed(tmp_path, launch={"by": "process"})), ProcessLauncher)


def test_auto_is_decided_once_and_says_why_it_is_no_containers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine with GPUs: an engine that answers for the first time in the middle of a run changes nothing in it."""
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 8)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    settings, told = choose.decided(LaunchSettings())
    assert told is not None
    assert told.startswith(
        "stages run as plain processes of this machine: no Docker engine answers at "
        f"{tmp_path}/docker.sock (No such file or directory). To mend it: start the engine of that socket"
    )
    with engine_of(tmp_path / "docker.sock"):
        assert choose.decided(settings) == (settings, None)
        assert not choose.in_containers(settings)
        assert choose.decided(LaunchSettings()) == (LaunchSettings(by="docker"), None)
    hosts = ("ssh://gpu1",)
    assert choose.decided(LaunchSettings(hosts=hosts)) == (LaunchSettings(by="docker", hosts=hosts), None)
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    assert choose.decided(LaunchSettings()) == (LaunchSettings(by="process"), None)


def test_a_run_says_at_once_what_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a server is started, and where all is there but a stage is to be done again."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    asked = changed(tmp_path, launch={"by": "docker"})
    (problem,) = choose.in_the_way(asked)
    told = str(problem)
    assert told.startswith(f"no Docker engine answers at {tmp_path}/none (No such file or directory). To mend it: ")
    assert choose.in_the_way(changed(tmp_path, launch={"by": "process"})) == ()
    make_results(asked)
    record = RunRecord(name="brisk-otter", state="done", config=asked.model_dump(mode="json"), cwd="/", pid=1, started=now())
    folder = RunFolder(tmp_path, "brisk-otter")
    folder.path.mkdir(parents=True)
    folder.write(record)
    assert cli.main(["rerun", "brisk-otter", "--stage", "train", "--workspace", str(tmp_path)]) == 2
    assert f"error: launch: {told}" in capsys.readouterr().err


# The request


def asked(settings: LaunchSettings, gpus: Gpus = NO_GPUS, place: Place = ALONE, **ours: str) -> dict[str, Any]:
    ask = Ask(
        "sha256:1", "a-name", ["flows.launch.shim"], [Bind(Path("/data/w"), Path("/data/w"), True)], {"run": "r"}, gpus, place
    )
    return request(ask, settings, {"HOME": "/home/me"} | ours)


def test_a_request_for_gpus() -> None:
    """As NVIDIA's examples have it: --gpus all --shm-size … --ulimit memlock=-1 --ulimit stack=67108864."""
    every = asked(LaunchSettings(shm_size=16_000_000_000), Gpus(count=-1))
    assert [dict(device) for device in every["device_requests"]] == [
        {"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert {limit.name: (limit.soft, limit.hard) for limit in every["ulimits"]} == {
        "memlock": (-1, -1), "stack": (67108864, 67108864),
    }  # fmt: skip
    assert every["shm_size"] == 16_000_000_000
    (some,) = asked(LaunchSettings(), Gpus(ids=("0", "3")))["device_requests"]
    assert (some["Count"], some["DeviceIDs"]) == (0, ["0", "3"])
    (two,) = asked(LaunchSettings(ulimits={}), Gpus(count=2))["device_requests"]
    assert two["Count"] == 2
    assert asked(LaunchSettings(ulimits={}), Gpus(count=2))["ulimits"] == []
    assert asked(LaunchSettings())["device_requests"] == []
    assert "shm_size" not in asked(LaunchSettings(ipc="host"))


def test_a_request_is_closed_by_default() -> None:
    wanted = asked(LaunchSettings(), HF_TOKEN="secret", PREFECT_API_KEY="secret", NCCL_DEBUG="INFO")
    assert (wanted["read_only"], wanted["cap_drop"], wanted["network_mode"]) == (True, ["ALL"], "none")
    assert wanted["use_config_proxy"] is False
    assert wanted["security_opt"] == ["no-new-privileges"]
    assert "secret" not in json.dumps(wanted["environment"])
    assert wanted["environment"]["NCCL_DEBUG"] == "INFO"
    assert wanted["environment"]["HOME"] == "/home/me"
    ours = f"exec,mode=1777,uid={os.getuid()},gid={os.getgid()}"
    assert wanted["tmpfs"] == {"/tmp": ours, "/home/me": ours}
    assert asked(LaunchSettings(), HOME="/")["tmpfs"] == {"/tmp": ours}  # of a service
    (mount,) = wanted["mounts"]
    assert (mount["Source"], mount["Target"], mount["ReadOnly"]) == ("/data/w", "/data/w", False)


def test_a_request_for_one_of_several_nodes() -> None:
    ours = asked(LaunchSettings(), place=Place(1, 2, "node-0:29400", "a-network", "node-1"))
    assert ours["network"] == "a-network"
    assert ours["networking_config"]["a-network"]["Aliases"] == ["node-1"]
    assert {name: value for name, value in ours["environment"].items() if name.startswith("STAGE_NODE") or "REND" in name} == {
        "STAGE_NODES": "2", "STAGE_NODE": "1", "STAGE_RENDEZVOUS": "node-0:29400",
    }  # fmt: skip
    assert asked(LaunchSettings(), place=Place(1, 2, "gpu1:29400", "host"))["network_mode"] == "host"
    assert _machine("ssh://me@gpu1:2222") == _machine("tcp://gpu1:2376") == "gpu1"


def test_names_of_containers() -> None:
    assert container_name("brisk-otter", "train", "0123456789", 1) == "brisk-otter-train-01234567-1"
    assert container_name("run 1/ü", "train", "0123456789") == "run-1---train-01234567"


# Mounts


@pytest.mark.parametrize("path", ["/", "/usr", "/opt", "/etc", "/var", "/tmp", "/proc/1", "/dev/shm", "/usr/local"])
def test_places_that_hide_the_container_s_own(path: str) -> None:
    with pytest.raises(
        NotReady, match=r"^workspace: \S+, mounted in a container, would (hide|be in) /\S+ of the container itself"
    ):
        check_place(Path(path), "workspace")


@pytest.mark.parametrize("path", ["/data", "/home/me/w", "/tmp/w", "/opt/data", "/var/tmp/w", "/mnt", "/usr/data"])
def test_places_that_are_fine(path: str) -> None:
    check_place(Path(path), "workspace")


def test_a_push_folder_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"the folder that push\.folder is in: /, mounted"):
        check_places(changed(tmp_path, push={"to": "folder", "folder": "/hub"}))


def mounted(spec: Any, **ours: str) -> set[tuple[str, str, bool]]:
    binds = binds_of(spec, {"HF_HOME": f"{spec.workspace}/cache"} | ours)
    return {(str(bind.source), str(bind.target), bind.is_writable) for bind in binds}


def test_what_a_download_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source at its own path, what links in it lead to, and of the Hub's cache all but the token that may lie there."""
    workspace, blobs, model = tmp_path / "w", tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    for folder in (workspace, blobs, model):
        folder.mkdir(parents=True)
    (blobs / "abc").touch()
    (model / "config.json").symlink_to("../../blobs/abc")
    monkeypatch.chdir(tmp_path)
    local = DownloadModelSpec.of(changed(workspace, model={"source": "hub/snapshots/1"}))
    assert mounted(local, SSL_CERT_DIR=str(blobs)) == {
        (str(workspace), str(workspace), True),
        (str(model), str(model), False),
        (str(blobs), str(blobs), False),
    }
    company, bundle, file = tmp_path / "company", tmp_path / "bundle", tmp_path / "ca.pem"
    for folder in (company, bundle):
        folder.mkdir()
    file.touch()
    (bundle / "1a2b.0").symlink_to("../hub/blobs/abc")  # as c_rehash makes them
    from_hub = DownloadDataSpec.of(changed(workspace, data={"source": "somebody/data"}))
    certificates = {
        "SSL_CERT_FILE": str(file), "SSL_CERT_DIR": f"{company}:{tmp_path}/none", "REQUESTS_CA_BUNDLE": str(bundle),
    }  # fmt: skip
    assert mounted(from_hub, **certificates) == {
        (str(workspace), str(workspace), True),
        *((str(path), str(path), False) for path in (company, bundle, blobs, file)),
        (str(workspace / "cache" / "hub"), "/caches/huggingface/hub", True),
        (str(workspace / "cache" / "datasets"), "/caches/huggingface/datasets", True),
    }
    inside = changed(workspace, data={"source": str(workspace / "text")})
    (workspace / "text").mkdir()
    assert len(mounted(DownloadDataSpec.of(inside))) == 1  # the workspace shows it
    pattern = changed(workspace, data={"source": f"{tmp_path}/hub/*/abc"})
    assert (str(tmp_path / "hub"), str(tmp_path / "hub"), False) in mounted(DownloadDataSpec.of(pattern))
    prefix = changed(workspace, data={"source": f"{blobs}/corpus", "format": "tokenized"})
    assert (str(blobs), str(blobs), False) in mounted(DownloadDataSpec.of(prefix))


def test_a_source_that_is_a_link(tmp_path: Path) -> None:
    """As that of the demo: a link in the workspace, to a folder with links of its own."""
    workspace, text, more = tmp_path / "w", tmp_path / "v1" / "text", tmp_path / "v1" / "more"
    for folder in (workspace, text, more):
        folder.mkdir(parents=True)
    (tmp_path / "current").symlink_to("v1")
    (workspace / "text").symlink_to(tmp_path / "current" / "text")
    (more / "a.txt").touch()
    (text / "a.txt").symlink_to("../more/a.txt")
    (text / "b.txt").symlink_to("a.txt")
    seen = mounted(DownloadDataSpec.of(changed(workspace, data={"source": str(workspace / "text")})))
    assert {source for source, target, _ in seen if source == target} == {
        str(workspace), str(tmp_path / "current" / "text"), str(text), str(more),
    }  # fmt: skip


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").symlink_to("b")
    (tmp_path / "text" / "b").symlink_to("a")
    (tmp_path / "text" / "c").symlink_to("/nowhere/at/all")
    spec = DownloadDataSpec.of(changed(tmp_path / "w", data={"source": str(tmp_path / "text")}))
    assert len(mounted(spec)) == 2


def test_who_talks_to_the_hub(tmp_path: Path) -> None:
    """Who gets the token, and a way out to the network."""
    (tmp_path / "a.txt").touch()

    def talking(**sections: Any) -> set[str]:
        asked = changed(tmp_path / "w", **sections)
        return {spec.NODE for spec in (DownloadModelSpec.of(asked), DownloadDataSpec.of(asked)) if spec.talks_to_hub}

    here, there = str(tmp_path), "somebody/thing"
    tokens = {"source": f"{here}/corpus", "format": "tokenized"}
    assert talking(model={"source": here}, data={"source": there}) == {"download-data"}
    assert talking(model={"source": there}, data={"source": f"{here}/*.txt"}) == {"download-model"}
    assert talking(model={"source": here}, data=tokens) == set()
    assert talking(model={"source": here}, data={"blend": [{"source": here}, {"source": there}]}) == {"download-data"}
    assert not TrainSpec.model_validate({"workspace": here, "settings": {"steps": 1}}).talks_to_hub
    push = [{"to": "hub", "repo": "me/mine"}, {"to": "dry-run", "repo": "me/mine"}, {"to": "folder", "folder": here}]
    assert [PushSpec.model_validate({"workspace": here, "settings": each}).talks_to_hub for each in push] == [
        True,
        False,
        False,
    ]


def test_what_other_stages_see(tmp_path: Path) -> None:
    train = TrainSpec.model_validate({"workspace": str(tmp_path), "settings": {"steps": 1}})
    assert mounted(train) == {(str(tmp_path), str(tmp_path), True)}
    push = PushSpec.model_validate(
        {"workspace": str(tmp_path / "w"), "settings": {"to": "folder", "folder": str(tmp_path / "h/m")}}
    )
    assert (str(tmp_path / "h"), str(tmp_path / "h"), True) in mounted(push)  # push writes beside its target first
    make_folders(binds_of(push, {}))
    assert (tmp_path / "h").is_dir()


def test_mounts_that_others_show_already() -> None:
    data, inside = Path("/data"), Path("/data/w")
    assert _without_doubles([Bind(inside, inside, True), Bind(data, data)]) == [Bind(data, data), Bind(inside, inside, True)]
    assert _without_doubles([Bind(inside, inside), Bind(data, data, True)]) == [Bind(data, data, True)]
    assert _without_doubles([Bind(data, data), Bind(data, data, True)]) == [Bind(data, data, True)]
