"""What is in the way of containers: found before anything runs, and told with what mends it. Without an engine."""

import contextlib
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError, ImageNotFound
from engines import SocketEngine, engine_of
from fake_stages import changed
from processes import wait_until
from requests import ConnectionError as RequestsError

from flows.launch import docker, docker_checks, docker_engine
from flows.launch.docker import DockerLauncher
from flows.launch.docker import Engine as DockerEngine
from flows.launch.docker_checks import check_engine, check_settings, look_around
from flows.launch.docker_container import Container
from flows.launch.docker_engine import connected
from flows.launch.docker_leftovers import DOCTOR_SECONDS, _is_left, labels, remove_leftovers
from flows.launch.docker_refusals import problem_of, refusals_told
from flows.launch.docker_request import Place
from flows.launch.gpus import processes_on
from flows.launch.problems import NotReady
from flows.launch.protocol import Caller, StageJob
from stages.contracts import launch_settings
from stages.contracts.launch_settings import LaunchSettings
from stages.contracts.specs import SPECS, TrainSpec


def refused(host: str) -> str:
    with pytest.raises(NotReady) as caught, connected(host):
        pass
    return str(caught.value)


def test_an_engine_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine.shutil, "which", lambda name: None)
    host = f"unix://{tmp_path}/docker.sock"
    nobody = f"no Docker engine answers at {tmp_path}/docker.sock (No such file or directory). To mend it: "
    assert refused(host).startswith(
        nobody + "start the engine of that socket, or name another's in launch.hosts or DOCKER_HOST"
    )
    with monkeypatch.context() as usual:
        usual.setattr(docker_engine, "HERE", host)
        assert refused(host).startswith(nobody + "install")
        usual.setattr(docker_engine.shutil, "which", lambda name: "/usr/bin/dockerd")
        assert refused(host).startswith(nobody + "sudo systemctl start docker")
    assert refused("junk") == (
        "DOCKER_HOST=junk is no address of an engine. To mend it: unset DOCKER_HOST for unix:///var/run/docker.sock, or set "
        "it: unix:///PATH, ssh://USER@MACHINE or tcp://MACHINE:PORT"
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


def test_an_engine_that_is_too_old(tmp_path: Path) -> None:
    host = f"unix://{tmp_path}/docker.sock"
    with engine_of(tmp_path / "docker.sock", api="1.39"):
        assert refused(host) == (
            f"the Docker engine at {host} is older than 19.03. To mend it: install a newer one: docs.docker.com/engine"
        )
    with engine_of(tmp_path / "docker.sock", api="1.40"), connected(host) as client:
        assert client.api.api_version == "1.40"


def test_the_engine_of_another_context_of_docker_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rootless Docker, Docker Desktop and colima have sockets of their own, which the docker command finds by its context."""
    host = f"unix://{tmp_path}/docker.sock"
    command = "docker context inspect -f '{{.Endpoints.docker.Host}}'"
    told = f"; or, for that of docker's context colima: export DOCKER_HOST=$({command})"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(docker_engine, "HERE", host)
    for content, is_told in (('{"currentContext": "colima"}', True), ('{"currentContext": "default"}', False), ("[]", False)):
        (tmp_path / "config.json").write_text(content)
        assert refused(host).endswith(told) == is_told
    (tmp_path / "config.json").write_text('{"currentContext": "colima"}')
    assert not refused(f"unix://{tmp_path}/named.sock").endswith(told)  # a person named that one

    def refuse(self: object, path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(docker_engine.socket.socket, "connect", refuse)
    assert refused(host).endswith(told)


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

    def __init__(self, *images: str, **info: Any) -> None:
        self.images, self._images, self._info = self, images, info

    def get(self, name: str) -> Any:
        if name not in self._images:
            raise ImageNotFound(name)
        return SimpleNamespace(id="sha256:1", attrs={})

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
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 0)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    with pytest.raises(NotReady) as caught:
        check_engine(Engine(Runtimes={"nvidia": {}}), host, LaunchSettings.model_validate(launch), {})
    assert told in str(caught.value)


def test_no_nvidia_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_checks.shutil, "which", lambda name: None)
    wanted = LaunchSettings(gpus="all", image="mine")
    with pytest.raises(
        NotReady, match=r"NVIDIA's runtime is missing. To mend it: sudo apt-get install nvidia-container-toolkit"
    ):
        check_engine(Engine("mine", Runtimes={"runc": {}}), "unix:///x", wanted, {})
    check_engine(Engine("mine", Runtimes={"runc": {}, "nvidia": {}}), "unix:///x", wanted, {})
    check_engine(Engine("mine", Runtimes={"runc": {}}), "unix:///x", LaunchSettings(gpus="none", image="mine"), {})


def test_a_workspace_that_would_hide_the_container_s_own() -> None:
    with pytest.raises(NotReady, match="workspace: /usr, mounted in a container, would hide /usr/"):
        check_settings(changed(Path("/usr"), launch={"by": "docker"}), {})


def test_too_little_for_the_processes(tmp_path: Path) -> None:
    few = changed(tmp_path, launch={"by": "docker", "gpus": 2}, layout={"tp": 4})
    with pytest.raises(NotReady, match=r"layout has 4 processes on one machine .*, and launch.gpus=2 gives them 2 GPUs"):
        check_settings(few, {})
    little = changed(tmp_path, launch={"by": "docker", "gpus": 4, "shm_size": "64MB"}, layout={"tp": 4})
    with pytest.raises(
        NotReady, match=r"launch.shm_size=64.0 MB is too little shared memory for NCCL.* set launch.shm_size: 8GB"
    ):
        check_settings(little, {})
    check_settings(
        changed(tmp_path, launch={"by": "docker", "gpus": 4, "shm_size": "64MB", "ipc": "host"}, layout={"tp": 4}), {}
    )


def test_verify_has_all_ranks_on_the_first_machine(tmp_path: Path) -> None:
    """Two machines with two GPUs are enough to train with tp=4, and not to verify."""
    hosts = ["ssh://gpu1", "ssh://gpu2"]
    asked = changed(tmp_path, launch={"hosts": hosts, "gpus": 2}, layout={"tp": 4})
    assert asked.processes_per_machine == 2
    assert [processes_on(asked, host=host) for host in hosts] == [4, 2]
    with pytest.raises(NotReady, match=r"tp × pp of verify, all on the first\).*, and launch.gpus=2 gives them 2 GPUs"):
        check_settings(asked, {})
    check_settings(
        changed(tmp_path, launch={"hosts": hosts, "gpus": 2}, layout={"tp": 2}, train={"steps": 2, "sequence_length": 16}), {}
    )


@pytest.mark.parametrize(
    ("gpus", "shm_size", "told"),
    [
        (1, 8 << 30, "has 2 processes on one machine .* that of here has 1 GPU[.]"),
        (None, 8 << 30, ""),
        (2, 64 << 20, "67.1 MB at here is too little shared memory for NCCL"),
    ],
)
def test_too_little_for_the_processes_where_all_gpus_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int | None, shm_size: int, told: str
) -> None:
    """How much that is is what a container sees; WSL does not show its GPUs."""
    seen = {"is_visible": True, "is_writable": True, "shm_size": shm_size, "code": docker_checks.code_digest(), "gpus": gpus}
    monkeypatch.setattr(docker_checks, "_seen", lambda *asked: seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    image = docker_checks.Image("mine", "sha256:1", "sha256:1")
    with pytest.raises(NotReady, match=told) if told else contextlib.nullcontext():
        look_around(None, "here", LaunchSettings(gpus="all"), image, [], {}, workspace=tmp_path, processes=2)


def test_a_container_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk does not answer: no signal ends it, so its end is not waited for."""
    monkeypatch.setattr(docker_checks, "PROBE_SECONDS", 0.2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    image, engine = docker_checks.Image("mine", "sha256:1", "sha256:1"), SocketEngine()
    marks = labels(workspace=tmp_path, run="", node="probe", attempt="1", grace=0.0)
    with pytest.raises(NotReady) as caught:
        look_around(engine, "here", LaunchSettings(gpus="none"), image, [], marks, workspace=tmp_path, processes=1)
    assert str(caught.value) == (
        "a container of mine at here hangs: it said nothing within 0.2 seconds. "
        f"To mend it: see what does not answer on that machine: ls {tmp_path}"
    )
    wait_until(lambda: sorted(engine.calls) == ["kill", "remove"])  # another thread kills it
    assert list(tmp_path.iterdir()) == []
    assert engine.labels["megatron-flows.stage"] == "probe"


@pytest.mark.parametrize(
    ("run", "age", "left"), [("", DOCTOR_SECONDS - 9, False), ("", DOCTOR_SECONDS + 9, True), ("gone", 0, True)]
)
def test_what_is_left(tmp_path: Path, run: str, age: float, left: bool) -> None:
    """What a run left that nobody does; of a doctor, who does none, what is older than it can be."""
    marks = labels(workspace=tmp_path, run=run, node="probe", attempt="theirs", grace=0.0)
    asked = float(marks["megatron-flows.asked"])
    assert _is_left(marks | {"megatron-flows.asked": str(asked - age)}, tmp_path, "ours", "calm-heron") == left


def test_all_hosts_are_looked_at_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when training begins, hours later. The further ones see the workspace, as training does, and no more."""
    first, second = f"unix://{tmp_path}/1.sock", f"unix://{tmp_path}/2.sock"
    image = docker_checks.Image("mine", "sha256:1", "sha256:1")
    looked: list[tuple[str, set[Path]]] = []

    def look(client: Any, host: str, settings: Any, image: Any, binds: Any, marks: Any, **more: Any) -> None:
        looked.append((host, {bind.source for bind in binds}))

    monkeypatch.setattr(docker, "look_around", look)
    monkeypatch.setattr(docker, "remove_leftovers", lambda *asked, **more: None)
    monkeypatch.setattr(docker, "check_engine", lambda *asked: image)
    (tmp_path / "text").mkdir()
    hosts, text = [first, second, second, first], str(tmp_path / "text")
    asked = changed(tmp_path / "w", launch={"hosts": hosts}, layout={"dp": 4}, data={"source": text})
    launcher, caller = DockerLauncher(asked), Caller(print, print, threading.Event())

    def engines(stage: str, node: str) -> list[str]:
        settings = {"train": {"settings": {"steps": 1}}, "download-data": {"data": asked.data}}[node]
        spec = SPECS[node].model_validate({"workspace": str(tmp_path / "w")} | settings)
        with contextlib.ExitStack() as stack:
            job = StageJob(node, stage, tmp_path / "spec.json", tmp_path / "log", "brisk-otter")
            return [engine.host for engine in launcher._engines(job, spec, stack, caller)]

    with engine_of(tmp_path / "1.sock"):
        with pytest.raises(NotReady, match=f"no Docker engine answers at {tmp_path}/2.sock"):
            engines("download", "download-data")
        looked.clear()
        with engine_of(tmp_path / "2.sock"):
            assert engines("download", "download-data") == [first]
            assert looked == [(second, {tmp_path / "w"})]  # the first one was ready
            launcher._looked_at.clear()
            engines("download", "download-data")
            assert looked[1:] == [(first, {tmp_path / "w", tmp_path / "text"}), (second, {tmp_path / "w"})]
            assert engines("train", "train") == hosts
            assert len(looked) == 3  # once
        assert engines("download", "download-data") == [first]  # which needs no other


def test_where_containers_of_several_machines_meet(tmp_path: Path) -> None:
    """In the network of their machines; several on one engine, whatever it is called, in one of their own."""
    hosts = ["ssh://me@gpu1", "ssh://me@gpu2"]
    job = StageJob("train", "train", tmp_path / "spec.json", tmp_path / "log", "brisk-otter")
    spec = TrainSpec.model_validate({"workspace": str(tmp_path), "settings": {"steps": 1}})
    image = docker_checks.Image("mine", "sha256:1", "sha256:1")
    made: list[dict[str, Any]] = []

    def create(name: str, **asked: Any) -> Any:
        made.append(asked)
        return SimpleNamespace(name=name, remove=lambda: made.append({}))

    def places(ids: str, **launch: str) -> list[Place]:
        networks = SimpleNamespace(create=create)
        clients = [SimpleNamespace(info=lambda id=id: {"ID": id}, networks=networks) for id in ids]
        launcher = DockerLauncher(changed(tmp_path, launch={"hosts": hosts, **launch}, layout={"tp": 2}))
        engines = [DockerEngine(host, client, image) for host, client in zip(hosts, clients, strict=True)]
        with launcher._places(job, spec, engines) as places:
            return places

    assert places("ab") == [Place(node, 2, "gpu1:29400", network="host") for node in (0, 1)]
    assert places("ab", rendezvous="10.0.0.1")[1] == Place(1, 2, "10.0.0.1:29400", network="host")
    assert places("ab", rendezvous="10.0.0.1:7000")[1] == Place(1, 2, "10.0.0.1:7000", network="host")
    assert made == []
    own = places("aa")
    assert [(place.rendezvous, place.alias) for place in own] == [("node-0:29400", "node-0"), ("node-0:29400", "node-1")]
    assert own[0].network.startswith("brisk-otter-train-")
    (network, removed) = made
    assert (network["internal"], network["labels"]["megatron-flows.run"], removed) == (True, "brisk-otter", {})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (APIError('could not select device driver "" with capabilities: [[gpu]]'), "nvidia-container-toolkit"),
        (APIError("error setting rlimit type 8: operation not permitted"), "set launch.ulimits: {}"),
        (
            APIError('invalid mount config for type "bind": bind source path does not exist: /data/my hub'),
            "ssh://me@gpu1:22 lacks the folder /data/my hub. To mend it: ssh -p 22 me@gpu1 mkdir -p '/data/my hub'; or, where",
        ),
        (APIError('exec: "python": executable file not found in $PATH'), "the image is none of ours"),
        (
            APIError("could not find an available, non-overlapping IPv4 address pool"),
            "docker -H ssh://me@gpu1:22 network pru",
        ),
        (
            APIError("no space left on device"),
            "refuses: no space left on device. To mend it: docker info",
        ),
        (
            ConnectionError("Connection aborted"),
            "not answer any more: Connection aborted. To mend it: docker -H ssh://",
        ),
        (BrokenPipeError("Broken pipe"), "does not answer any more: Broken pipe"),
    ],
)
def test_what_an_engine_refuses(error: Exception, told: str) -> None:
    assert told in str(problem_of(error, "ssh://me@gpu1:22"))
    with pytest.raises(NotReady, match=re.escape(told)), refusals_told("ssh://me@gpu1:22"):
        raise error


def gone(*args: Any, **kwargs: Any) -> Any:
    """A call of an engine that went away after it had answered."""
    raise RequestsError("Connection aborted")


def test_an_engine_that_goes_away_while_it_is_looked_at(tmp_path: Path) -> None:
    """Each of these ends as a refusal that says so, and not as a defect of ours."""
    here, wanted, stop = "unix:///x", LaunchSettings(gpus="all"), threading.Event()
    launcher = DockerLauncher(changed(tmp_path, launch={"hosts": [here, here]}, layout={"tp": 2}))
    job = StageJob("train", "train", tmp_path / "spec.json", tmp_path / "log", "brisk-otter")
    spec = TrainSpec.model_validate({"workspace": str(tmp_path), "settings": {"steps": 1}})
    image = docker_checks.Image("mine", "sha256:1", "sha256:1")

    def places(client: Any) -> None:
        with launcher._places(job, spec, [DockerEngine(here, client, image)] * 2):
            pass

    networks = SimpleNamespace(create=gone)
    for look in (
        lambda: check_engine(SimpleNamespace(info=gone), here, wanted, {}),
        lambda: check_engine(SimpleNamespace(images=SimpleNamespace(get=gone)), here, LaunchSettings(gpus="none"), {}),
        lambda: remove_leftovers(
            SimpleNamespace(containers=SimpleNamespace(list=gone)), here, tmp_path, attempt="", run="", stop=stop, say=print
        ),
        lambda: places(SimpleNamespace(info=gone)),
        lambda: places(SimpleNamespace(info=lambda: {"ID": "1"}, networks=networks)),
        lambda: look_around(
            SimpleNamespace(containers=SimpleNamespace(create=gone), api=None), here, wanted, image, [], {},
            workspace=tmp_path, processes=1,
        ),
    ):  # fmt: skip
        with pytest.raises(NotReady, match=f"the Docker engine at {here} does not answer any more"):
            look()


def test_a_container_whose_engine_is_gone() -> None:
    """All members of a group are asked to stop, whatever becomes of the first one's engine; what is lost is told at the end."""
    container = Container.__new__(Container)  # one that runs: creating it needs an engine
    container._api, container._id = SimpleNamespace(kill=gone, wait=gone, inspect_container=gone), "1"
    container.ask_to_stop()
    container.kill()
    container.hold((0,))
    assert container.ended(0.0).lost == "the Docker engine is gone: Connection aborted"
