"""What the Docker launcher asks for and makes of what it hears, without an engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config as small_config
from fake_stages import make_results

from flows.launch import choose, docker_checks, docker_engine
from flows.launch.docker import DockerLauncher, _machine
from flows.launch.docker_checks import check_settings, find_image, gpus_of, start_problem
from flows.launch.docker_engine import NotReady, connected
from flows.launch.docker_mounts import Bind, _without_doubles, binds_of, check_place, check_places
from flows.launch.docker_request import Ask, Place, container_name, request
from flows.launch.process import ProcessLauncher
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import Gpus, LaunchSettings
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PushSpec, TrainSpec

NO_GPUS, ALONE = Gpus(), Place()


def config(workspace: Path, launch: dict[str, Any], **sections: Any) -> PipelineConfig:
    values = small_config(workspace).model_dump(mode="json") | sections
    return PipelineConfig.model_validate(values | {"launch": launch})


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


def test_several_hosts_have_gpus_whatever_this_machine_has() -> None:
    settings = LaunchSettings(hosts=("ssh://me@gpu1", "ssh://me@gpu2"))
    assert settings.wanted_gpus(visible=None, has_gpus=False) == Gpus(count=-1)


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ({"gpus": "some"}, "'some' must be auto, all, none, a count such as 4, or device=0,1"),
        ({"hosts": ["gpu1"]}, "hosts: gpu1 must be unix:///PATH, ssh://USER@MACHINE or tcp://MACHINE:PORT"),
        ({"hosts": ["http://gpu1"]}, "hosts: http://gpu1 must be"),
        ({"by": "process", "hosts": ["ssh://gpu1"]}, "by=process uses none: set by to docker, or leave hosts out"),
        ({"rendezvous": "gpu1"}, "rendezvous is where several hosts meet, and hosts names fewer than two: leave it out"),
        ({"hosts": ["ssh://gpu1", "ssh://gpu2"]}, "launch.hosts: 2 machines cannot share the 1 processes of layout"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, launch: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        config(tmp_path, launch)
    assert told in str(caught.value)


def test_which_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: False)
    assert isinstance(choose.launcher_for(config(tmp_path, {})), ProcessLauncher)
    assert isinstance(choose.launcher_for(config(tmp_path, {"by": "docker"})), DockerLauncher)
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: True)
    monkeypatch.setattr(docker_engine, "answers", lambda host: True)
    assert isinstance(choose.launcher_for(config(tmp_path, {})), DockerLauncher)
    assert isinstance(choose.launcher_for(config(tmp_path, {"by": "process"})), ProcessLauncher)
    monkeypatch.setattr(docker_engine, "answers", lambda host: False)
    assert isinstance(choose.launcher_for(config(tmp_path, {})), ProcessLauncher)


def test_a_run_says_at_once_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before a server is started; and not where there is nothing left to run."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    told = choose.in_the_way(config(tmp_path, {"by": "docker"}))
    assert told is not None
    assert told.startswith(f"no Docker engine answers at {tmp_path}/none (No such file or directory). To mend it: ")
    assert choose.in_the_way(config(tmp_path, {"by": "process"})) is None
    make_results(small_config(tmp_path))
    assert choose.in_the_way(config(tmp_path, {"by": "docker"})) is None


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
    assert wanted["security_opt"] == ["no-new-privileges"]
    assert "secret" not in json.dumps(wanted["environment"])
    assert wanted["environment"]["NCCL_DEBUG"] == "INFO"
    assert wanted["environment"]["HOME"] == "/home/me"
    assert wanted["tmpfs"] == {"/tmp": "exec,mode=1777", "/home/me": "exec,mode=1777"}
    assert asked(LaunchSettings(), HOME="/")["tmpfs"] == {"/tmp": "exec,mode=1777"}  # of a service
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
        check_places(config(tmp_path, {}, push={"to": "folder", "folder": "/hub"}))


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
    certificates = tmp_path / "ca.pem"
    certificates.touch()
    monkeypatch.chdir(tmp_path)
    asked = config(workspace, {}, model={"source": "hub/snapshots/1"})
    assert mounted(DownloadModelSpec.of(asked), SSL_CERT_FILE=str(certificates)) == {
        (str(workspace), str(workspace), True),
        (str(model), str(model), False),
        (str(blobs), str(blobs), False),
        (str(certificates), str(certificates), False),
        (str(workspace / "cache" / "hub"), "/caches/huggingface/hub", True),
        (str(workspace / "cache" / "datasets"), "/caches/huggingface/datasets", True),
    }
    from_hub = config(workspace, {}, data={"source": "somebody/data"})
    assert len(mounted(DownloadDataSpec.of(from_hub))) == 3
    inside = config(workspace, {}, data={"source": str(workspace / "text")})
    (workspace / "text").mkdir()
    assert len(mounted(DownloadDataSpec.of(inside))) == 3  # the workspace shows it
    pattern = config(workspace, {}, data={"source": f"{tmp_path}/hub/*/abc"})
    assert (str(tmp_path / "hub"), str(tmp_path / "hub"), False) in mounted(DownloadDataSpec.of(pattern))
    prefix = config(workspace, {}, data={"source": f"{blobs}/corpus", "format": "tokenized"})
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
    seen = mounted(DownloadDataSpec.of(config(workspace, {}, data={"source": str(workspace / "text")})))
    assert {source for source, target, _ in seen if source == target} == {
        str(workspace), str(tmp_path / "current" / "text"), str(text), str(more),
    }  # fmt: skip


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").symlink_to("b")
    (tmp_path / "text" / "b").symlink_to("a")
    (tmp_path / "text" / "c").symlink_to("/nowhere/at/all")
    spec = DownloadDataSpec.of(config(tmp_path / "w", {}, data={"source": str(tmp_path / "text")}))
    assert len(mounted(spec)) == 4


def test_what_other_stages_see(tmp_path: Path) -> None:
    train = TrainSpec.model_validate({"workspace": str(tmp_path), "settings": {"steps": 1}})
    assert mounted(train) == {(str(tmp_path), str(tmp_path), True)}
    push = PushSpec.model_validate(
        {"workspace": str(tmp_path / "w"), "settings": {"to": "folder", "folder": str(tmp_path / "h/m")}}
    )
    assert (str(tmp_path / "h"), str(tmp_path / "h"), True) in mounted(push)  # push writes beside its target first
    assert (tmp_path / "h").is_dir()


def test_mounts_that_others_show_already() -> None:
    data, inside = Path("/data"), Path("/data/w")
    assert _without_doubles([Bind(inside, inside, True), Bind(data, data)]) == [Bind(data, data), Bind(inside, inside, True)]
    assert _without_doubles([Bind(inside, inside), Bind(data, data, True)]) == [Bind(data, data, True)]
    assert _without_doubles([Bind(data, data), Bind(data, data, True)]) == [Bind(data, data, True)]


# What is in the way


def refused(host: str) -> str:
    with pytest.raises(NotReady) as caught, connected(host):
        pass
    return str(caught.value)


def test_an_engine_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine.shutil, "which", lambda name: None)
    told = refused(f"unix://{tmp_path}/docker.sock")
    assert told.startswith(
        f"no Docker engine answers at {tmp_path}/docker.sock (No such file or directory). To mend it: install"
    )
    (tmp_path / "docker.sock").touch()
    assert "To mend it: sudo systemctl start docker" in refused(f"unix://{tmp_path}/docker.sock")

    def refuse(self: object, path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(docker_engine.socket.socket, "connect", refuse)
    told = refused(f"unix://{tmp_path}/docker.sock")
    assert told.startswith(
        f"the Docker socket {tmp_path}/docker.sock refuses this user. To mend it: sudo usermod -aG docker $USER"
    )


def test_an_engine_without_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    (tmp_path / "ca.pem").touch()
    assert refused("tcp://gpu2:2376") == (
        "tcp://gpu2:2376 needs TLS, else everybody who reaches that port is root there; "
        f"{tmp_path}/cert.pem, {tmp_path}/key.pem not found. To mend it: put the certificates of that engine there, or name "
        "their folder: export DOCKER_CERT_PATH=FOLDER"
    )


def test_ssh_that_does_not_get_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\necho 'me@gpu2: Permission denied (publickey).' >&2\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert refused("ssh://me@gpu2:2222") == (
        "ssh://me@gpu2:2222: me@gpu2: Permission denied (publickey).. To mend it: ssh -p 2222 me@gpu2 docker version must work "
        "without asking for a password"
    )


class Engine:
    """What a client is asked before anything runs."""

    def __init__(self, **info: Any) -> None:
        self.images, self._info = self, info

    def get(self, name: str) -> None:
        from docker.errors import ImageNotFound

        raise ImageNotFound(name)

    def info(self) -> dict[str, Any]:
        return self._info


@pytest.mark.parametrize(
    ("launch", "host", "told"),
    [
        ({}, "unix:///var/run/docker.sock", "has no image megatron-flows:cpu. To mend it: make image-cpu"),
        ({"gpus": "all"}, "unix:///var/run/docker.sock", "has no image megatron-flows:gpu. To mend it: make image-gpu"),
        ({"image": "me/mine:1"}, "unix:///var/run/docker.sock", "To mend it: docker pull me/mine:1"),
        ({"image": "me/mine:1"}, "ssh://gpu2", "To mend it: docker -H ssh://gpu2 pull me/mine:1"),
        (
            {"gpus": "all"},
            "ssh://gpu2",
            "docker save megatron-flows:gpu | docker -H ssh://gpu2 load (after make image-gpu here)",
        ),
    ],
)
def test_a_missing_image(launch: dict[str, Any], host: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_checks, "machine_has_gpus", lambda: False)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    settings = LaunchSettings.model_validate(launch)
    with pytest.raises(NotReady) as caught:
        find_image(Engine(), host, settings, gpus_of(settings, {}))
    assert told in str(caught.value)


def test_no_nvidia_runtime() -> None:
    with pytest.raises(
        NotReady, match=r"NVIDIA's runtime is missing. To mend it: sudo apt-get install nvidia-container-toolkit"
    ):
        docker_checks.check_gpus(Engine(Runtimes={"runc": {}}), "unix:///x", Gpus(count=-1))
    docker_checks.check_gpus(Engine(Runtimes={"runc": {}, "nvidia": {}}), "unix:///x", Gpus(count=-1))
    docker_checks.check_gpus(Engine(Runtimes={"runc": {}}), "unix:///x", Gpus())


def test_too_little_for_the_processes(tmp_path: Path) -> None:
    few = config(tmp_path, {"by": "docker", "gpus": 2}, layout={"tp": 4})
    with pytest.raises(NotReady, match=r"layout has 4 processes a machine, and launch.gpus=2 gives them 2 GPUs"):
        check_settings(few, {})
    little = config(tmp_path, {"by": "docker", "gpus": 4, "shm_size": "64MB"}, layout={"tp": 4})
    with pytest.raises(
        NotReady, match=r"launch.shm_size=64.0 MB is too little shared memory for NCCL.* set launch.shm_size: 8GB"
    ):
        check_settings(little, {})
    check_settings(config(tmp_path, {"by": "docker", "gpus": 4, "shm_size": "64MB", "ipc": "host"}, layout={"tp": 4}), {})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "nvidia-container-toolkit"),
        ("error setting rlimit type 8: operation not permitted", "set launch.ulimits: {}"),
        ('invalid mount config for type "bind": bind source path does not exist: /data', "at the same path"),
        ('exec: "python": executable file not found in $PATH', "the image is none of ours"),
        ("no space left on device", "does not start a container: no space left on device"),
    ],
)
def test_why_a_container_does_not_start(error: str, told: str) -> None:
    assert told in str(start_problem(RuntimeError(error), "here", LaunchSettings()))
