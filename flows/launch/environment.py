"""Which of our environment a stage gets: an allow-list. Nothing of Prefect's, and secrets only where the Hub is talked to."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

# Where programs, caches and devices are.
ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
)  # fmt: skip
ALLOWED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "TRITON_", "OMP_", "MKL_")
# Only the stages that talk to the Hub: its token and address, and how to get out of this network (proxies have passwords).
ONLY_FOR_HUB = (
    "HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT",
)  # fmt: skip

# A container has its own programs, libraries and folders: of ours it gets what says how to compute and to communicate.
IN_CONTAINERS = ("LANG", "TZ", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
IN_CONTAINERS_PREFIXES = ("LC_", "NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_")

LISTENED_TO = {"STAGE_EVENTS": "1", "PYTHONUNBUFFERED": "1"}  # tells a stage that a launcher reads its output


def stage_environment(ours: Mapping[str, str], *, talks_to_hub: bool) -> dict[str, str]:
    """The environment of a stage: what is allowed of ours, and what tells it that a launcher listens."""
    environment = _allowed(ours, ALLOWED, ALLOWED_PREFIXES) | (hub_environment(ours) if talks_to_hub else {})
    environment["PYTHONPATH"] = python_path(environment)
    return environment | LISTENED_TO


def container_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What a container gets of ours. The engine shows it to whoever asks, so what only the Hub's stages get is not in it."""
    return _allowed(ours, IN_CONTAINERS, IN_CONTAINERS_PREFIXES) | LISTENED_TO


def hub_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What a stage gets in order to talk to the Hub, the token included."""
    return _allowed(ours, ONLY_FOR_HUB, ())


def python_path(ours: Mapping[str, str]) -> str:
    """PYTHONPATH of our own programs, wherever they are started."""
    return os.pathsep.join(filter(None, [str(source_root()), ours.get("PYTHONPATH")]))


def source_root() -> Path:
    """The folder that holds the package `stages`, wherever the person's current folder is."""
    spec = importlib.util.find_spec("stages")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _allowed(ours: Mapping[str, str], names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in ours.items() if name in names or name.startswith(prefixes)}
