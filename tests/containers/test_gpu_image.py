"""The image for GPUs, as containers/gpu.Dockerfile makes it of NVIDIA's, or of a stand-in for that (gpu_base.Dockerfile)."""

from pathlib import Path
from typing import Any

from scripted import scripted

from stages.contracts.launch_settings import GPU_IMAGE

DOCKERFILE = Path(__file__).parents[2] / "containers" / "gpu.Dockerfile"

# Where packages are, and their versions.
TELLS = """
from importlib import metadata, util
print(*(util.find_spec(name).origin for name in ("torch", "numpy")), *map(metadata.version, ("torch", "numpy", "flash-attn")))
"""


def test_what_is_the_base_s_own_stays(client: Any, workspace: Path) -> None:
    """And stages run on it, with the packages that it does not bring."""
    (base,) = [line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ARG BASE=")]
    python = {"entrypoint": ["python", "-c"], "network_mode": "none", "remove": True}
    of_the_base = client.containers.run(base.removeprefix("ARG BASE="), [TELLS], **python).decode().strip()
    code = f"{TELLS}\nimport huggingface_hub, stages.train, megatron_core_impl.trainer\nprint(huggingface_hub.__file__)"
    watched = scripted(workspace, code, image=GPU_IMAGE)
    watched.run()
    told, ours = watched.lines
    assert told == of_the_base
    assert ours.startswith("/opt/venv/")
    config = client.images.get(GPU_IMAGE).attrs["Config"]
    assert config["User"] == "1000:1000"
    assert not config["Entrypoint"]
