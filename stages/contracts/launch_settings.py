"""How stages are started: as processes of this machine, or in containers. None of it changes a result, so none is in a key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.contracts.settings import Frozen
from stages.contracts.sizes import Bytes

CPU_IMAGE, GPU_IMAGE = "megatron-flows:cpu", "megatron-flows:gpu"
GPU_STAGES = frozenset({"verify", "train", "export"})  # the others do not compute
DRIVER, WSL = Path("/proc/driver/nvidia/gpus"), Path("/dev/dxg")  # where the kernel has GPUs
PORT = 29400  # of the rendezvous, where launch.rendezvous names none
HOST = re.compile(r"unix:///\S+|ssh://([^\s/@-][^\s/@]*@)?[^\s/@:-][^\s/@:]*(:\d+)?(/\S*)?|tcp://[^\s/@:]+:\d+")
HOST_FORMS = "unix:///PATH, ssh://USER@MACHINE or tcp://MACHINE:PORT"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(:\d+)?")


@dataclass(frozen=True)
class Gpus:
    """Which GPUs of a machine containers get: so many, or those with these ids, or none."""

    count: int = 0  # -1: all
    ids: tuple[str, ...] = ()

    @property
    def known(self) -> int | None:
        """How many that is. None: as many as the machine has."""
        return len(self.ids) if self.ids else None if self.count < 0 else self.count


class LaunchSettings(Frozen):
    """How stages are started. None of it changes what they make."""

    by: Literal["auto", "process", "docker"] = Field(
        "auto",
        description="process: as plain processes of this machine; docker: each stage in a container; auto: docker where this "
        "machine has NVIDIA GPUs and a Docker engine answers, or hosts are named, else process",
    )
    image: str | None = Field(
        None, min_length=1,
        description=f"container image; default: {GPU_IMAGE} where containers get GPUs, else {CPU_IMAGE}",
    )  # fmt: skip
    gpus: str = Field(
        "auto",
        description="GPUs of each machine that stages get: all; none; a count, such as 4; device=0,1 for those with these "
        "ids; auto: all where this machine has any, or hosts are named. Where none are, `all` keeps to CUDA_VISIBLE_DEVICES",
    )
    shm_size: Bytes = Field(8_000_000_000, ge=1_000_000, description="shared memory of a container, which NCCL needs: 8GB")
    ipc: Literal["private", "host"] = Field("private", description="host: the shared memory of the machine instead of shm_size")
    ulimits: dict[str, int] | None = Field(
        None,
        description="limits such as {memlock: -1, stack: 67108864}; default: these two with GPUs, as NVIDIA advises, else the "
        "engine's",
    )
    memory: Bytes | None = Field(
        None, ge=32_000_000, description="most memory of a container, e.g. 200GB, beyond which the kernel kills; default: all"
    )
    cpus: float | None = Field(None, gt=0, description="most CPU time of a container, in cores, e.g. 12; default: all")
    hosts: tuple[str, ...] = Field(
        (),
        description="Docker engines that share the training, one container each: unix:///run/docker.sock, ssh://me@gpu2, "
        "tcp://gpu2:2376 (TLS); the first runs the other stages, too. The workspace must be the same folder on each. Default: "
        "the engine of this machine, or of DOCKER_HOST",
    )
    rendezvous: str | None = Field(
        None,
        description=f"several hosts: name or address of the first, as the others reach it, e.g. 10.0.0.1 or gpu1:{PORT}; "
        "default: as hosts names it",
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return f"device={','.join(map(str, value))}"
        return value

    @field_validator("gpus")
    @classmethod
    def _names_gpus(cls, value: str) -> str:
        if not re.fullmatch(r"auto|all|none|\d+|device=[\w.:-]+(,[\w.:-]+)*", value):
            raise ValueError(f"{value!r} must be auto, all, none, a count such as 4, or device=0,1")
        return "none" if value == "0" else value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        for host in self.hosts:
            if not HOST.fullmatch(host):
                raise ValueError(f"hosts: {host} must be {HOST_FORMS}, the address of an engine")
        if self.hosts and self.by == "process":
            raise ValueError("hosts are Docker engines, and by=process uses none: set by to docker, or leave hosts out")
        if self.rendezvous is not None and len(self.hosts) < 2:
            raise ValueError("rendezvous is where several hosts meet, and hosts names fewer than two: leave it out")
        if self.rendezvous is not None and not NAME.fullmatch(self.rendezvous):
            raise ValueError(f"rendezvous: {self.rendezvous} must be the first host's name or address, and a port if you like")
        return self

    def wanted_gpus(self, *, visible: str | None, has_gpus: bool) -> Gpus:
        """The GPUs of each machine.

        Args:
            visible: CUDA_VISIBLE_DEVICES of this machine, which narrows down `all` where no hosts are named.
            has_gpus: whether this machine has any.
        """
        text = self.gpus
        if text == "auto":
            text = "all" if self.hosts or has_gpus else "none"
        if text == "all" and visible is not None and not self.hosts:
            ids = tuple(filter(None, (part.strip() for part in visible.split(","))))
            return Gpus(ids=ids) if ids and ids != ("-1",) else Gpus()
        if text in ("all", "none"):
            return Gpus(count=-1 if text == "all" else 0)
        if text.startswith("device="):
            return Gpus(ids=tuple(text.removeprefix("device=").split(",")))
        return Gpus(count=int(text))

    def visible_to_processes(self, visible: str | None) -> str | None:
        """CUDA_VISIBLE_DEVICES of stages that are processes, by ours; None: all."""
        if self.gpus in ("auto", "all"):
            return visible
        if self.gpus == "none":
            return ""
        if self.gpus.startswith("device="):
            return self.gpus.removeprefix("device=")
        count = int(self.gpus)
        return ",".join(visible.split(",")[:count] if visible is not None else map(str, range(count)))


def machine_has_gpus() -> bool:
    """Whether this machine has NVIDIA GPUs, as its kernel says: their driver, or that of WSL."""
    return gpus_of_machine() != 0


def gpus_of_machine() -> int | None:
    """How many it has. None: some; WSL does not tell how many."""
    number = len(list(DRIVER.glob("*")))
    return None if not number and WSL.exists() else number
