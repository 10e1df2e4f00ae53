"""What the engine is asked for: the arguments of `containers.create`, for a stage or for a look around, as a dictionary."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, EndpointConfig, LogConfig, Mount, Ulimit

from flows.launch.docker_mounts import CACHES, OWN, Bind
from flows.launch.environment import container_environment
from stages.contracts.launch_settings import Gpus, LaunchSettings

HUB_NETWORK = "bridge"  # Docker's usual one, with a way out
GPU_ULIMITS = {"memlock": -1, "stack": 64 << 20}  # as NVIDIA advises

LABEL = "megatron-flows."  # begins the names of all our labels


@dataclass(frozen=True)
class Place:
    """Where a container stands among those that share a stage, and how they reach each other."""

    node: int = 0
    nodes: int = 1
    rendezvous: str = ""  # name or address of the first, and a port
    network: str = "none"  # a Docker network, or `host`
    alias: str = ""  # this one's name in a network of ours

    def environment(self) -> dict[str, str]:
        """What tells the stage."""
        if self.nodes == 1:
            return {}
        return {"STAGE_NODES": str(self.nodes), "STAGE_NODE": str(self.node), "STAGE_RENDEZVOUS": self.rendezvous}


@dataclass(frozen=True)
class Ask:
    """A container that is wanted."""

    image: str  # its id
    name: str
    command: list[str]
    binds: list[Bind]
    labels: dict[str, str]
    gpus: Gpus = field(default_factory=Gpus)
    place: Place = field(default_factory=Place)
    environment: dict[str, str] = field(default_factory=dict)
    hidden: list[Path] = field(default_factory=list)  # of what the binds show


def request(ask: Ask, settings: LaunchSettings, ours: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `containers.create`.

    The root file system is read-only, what is written outside of the mounts is in memory; no capability, no way to more
    rights, no network unless one is asked for. Docker keeps no log: its output is ours to redact and to write.

    Args:
        ours: our environment, of which a part is passed on.
    """
    home = _home(ours)
    wanted: dict[str, Any] = {
        "image": ask.image,
        "name": ask.name,
        "entrypoint": ["python", "-P", "-m"],
        "command": ask.command,
        "labels": ask.labels,
        "environment": container_environment(ours) | _folders(home, ask.binds) | ask.place.environment() | ask.environment,
        "user": f"{os.getuid()}:{os.getgid()}",
        "group_add": [str(group) for group in os.getgroups() if group != os.getgid()],
        "working_dir": str(Path.cwd()),  # relative paths of a configuration start there
        "mounts": [Mount(str(b.target), str(b.source), type="bind", read_only=not b.is_writable) for b in ask.binds],
        "tmpfs": dict.fromkeys(_in_memory(home, ask.binds), _memory()) | dict.fromkeys(map(str, ask.hidden), "ro"),
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "init": True,
        "stdin_open": True,
        "log_config": LogConfig(type="none"),
        "mem_limit": settings.memory,
        "memswap_limit": settings.memory,  # the same: no swap
        "nano_cpus": round(settings.cpus * 1e9) if settings.cpus else None,
        "use_config_proxy": False,  # proxies of ~/.docker/config.json have passwords, and the engine would show them
        "device_requests": _devices(ask.gpus),
        "ulimits": _ulimits(settings, ask.gpus),
    }
    if settings.ipc == "host":
        wanted["ipc_mode"] = "host"
    else:
        wanted["shm_size"] = settings.shm_size
    return wanted | _network(ask.place)


def _memory() -> str:
    """Options of what is written to and kept in memory. Compilers run what they write there; and where the image has the same
    folder, closed to others, engines keep its mode: so it is the person's.
    """
    return f"exec,mode=1777,uid={os.getuid()},gid={os.getgid()}"


def container_name(run: str, node: str, attempt: str, number: int = 0) -> str:
    """A name that people recognise in `docker ps`, and no other container has."""
    text = f"{run}-{node}-{attempt[:8]}" + (f"-{number}" if number else "")
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", text).lstrip("-._") or attempt


def _network(place: Place) -> dict[str, Any]:
    if not place.alias:
        return {"network_mode": place.network}
    return {
        "network": place.network,
        "hostname": place.alias,
        "networking_config": {place.network: EndpointConfig("1.40", aliases=[place.alias])},
    }


def _devices(gpus: Gpus) -> list[Any]:
    if gpus.ids:
        return [DeviceRequest(device_ids=list(gpus.ids), capabilities=[["gpu"]])]
    return [DeviceRequest(count=gpus.count, capabilities=[["gpu"]])] if gpus.count else []


def _ulimits(settings: LaunchSettings, gpus: Gpus) -> list[Any]:
    limits = settings.ulimits
    if limits is None:
        limits = GPU_ULIMITS if gpus.known != 0 else {}
    return [Ulimit(name=name, soft=value, hard=value) for name, value in limits.items()]


def _home(ours: Mapping[str, str]) -> Path:
    """The person's home, so that ~ means in a container what it means here; it is empty there but for mounts."""
    home = Path(ours.get("HOME") or "/tmp").absolute()
    return home if not any(own.is_relative_to(home) for own in OWN) else Path("/tmp")


def _in_memory(home: Path, binds: list[Bind]) -> list[str]:
    is_mounted = any(home.is_relative_to(bind.target) for bind in binds)
    return sorted({"/tmp"} | (set() if is_mounted else {str(home)}))


def _folders(home: Path, binds: list[Bind]) -> dict[str, str]:
    """Where programs may write: an unknown user has no home, and the root file system is read-only."""
    caches = {"HF_HUB_CACHE": CACHES / "hub", "HF_DATASETS_CACHE": CACHES / "datasets"}
    shown = {bind.target for bind in binds}
    return {
        "HOME": str(home), "USER": "finetune", "LOGNAME": "finetune", "TMPDIR": "/tmp", "XDG_CACHE_HOME": "/tmp/.cache",
        "XDG_CONFIG_HOME": "/tmp/.config", "MPLCONFIGDIR": "/tmp/.config/matplotlib", "TRITON_CACHE_DIR": "/tmp/.triton",
        "HF_HOME": "/tmp/.cache/huggingface", "PYTHONDONTWRITEBYTECODE": "1",
    } | {name: str(folder) for name, folder in caches.items() if folder in shown}  # fmt: skip
