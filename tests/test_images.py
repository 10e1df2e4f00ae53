"""The images' files: what both have in common is the same, and a base's own packages stay."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "containers"))
from requirements import constraints, requirements  # noqa: E402

NVIDIA = {
    "torch": "2.12.0a0+5dd1a1.nv26.5",
    "flash-attn": "2.8.3",
    "numpy": "2.1.0",
    "nvidia-cudnn-frontend": "1.1",
    "pip": "26",
}


def common(name: str) -> list[str]:
    """The instructions from the requirements on."""
    lines = (ROOT / "containers" / f"{name}.Dockerfile").read_text().splitlines()
    return [line for line in lines[lines.index("ARG PIP_NO_INDEX") :] if line and not line.startswith("#")]


def test_both_images_are_made_alike() -> None:
    assert common("cpu") == common("gpu")
    assert "USER 1000:1000" in common("cpu")
    assert any(line.startswith("RUN ") and line.endswith(" ./containers/install.sh") for line in common("gpu"))


def test_the_image_for_gpus_is_on_nvidia_s_pytorch() -> None:
    lines = (ROOT / "containers" / "gpu.Dockerfile").read_text().splitlines()
    base = lines.index("FROM ${BASE}")
    assert re.fullmatch(r"ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", lines[base - 1])
    assert f"`{lines[base - 1].removeprefix('ARG BASE=')}`" in (ROOT / "docs" / "containers.md").read_text()


def test_an_image_can_be_built_of_the_wheels_that_are_fetched() -> None:
    """They are for the Python of the environment, of which the base is then, and from the index that the image itself names."""

    def commands(*asked: str) -> str:
        """What make would do with this environment; `-W`: as if the versions had changed."""
        dry = ["make", "--dry-run", "-W", "constraints.txt", f"VENV={sys.prefix}", *asked]
        return subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    image, base = commands("image-cpu", "BUILD=--build-arg PIP_NO_INDEX=1"), f"python:3.{sys.version_info.minor}-slim"
    assert f"build --build-arg BASE={base} --build-arg PIP_NO_INDEX=1 -f" in image
    (index,) = [line for line in (ROOT / "containers" / "cpu.Dockerfile").read_text().splitlines() if "ARG TORCH_INDEX" in line]
    assert f"--extra-index-url {index.removeprefix('ARG TORCH_INDEX=')} torch\n" in commands("wheels")
    assert "extra-index-url" not in commands("wheels", "TORCH_INDEX=")


def test_a_base_keeps_what_is_its_own() -> None:
    """Neither pinned to another version nor asked for; all else is pinned as the project pins it."""
    pins = constraints(ROOT / "constraints.txt", NVIDIA)
    assert "torch===2.12.0a0+5dd1a1.nv26.5" in pins
    assert "flash-attn===2.8.3" in pins
    assert not any(line.startswith(("torch==2", "numpy==2.4", "pip==")) for line in pins)
    assert any(line.startswith("transformers==") for line in pins)
    wanted = requirements(ROOT / "pyproject.toml", NVIDIA)
    assert not any(line.startswith(("torch", "numpy")) for line in wanted)
    assert any(line.startswith("pydantic") for line in wanted)
    assert not any(line.startswith("prefect") for line in wanted)


def test_a_base_without_torch_gets_the_project_s() -> None:
    assert any(line.startswith("torch==") for line in constraints(ROOT / "constraints.txt", {"pip": "26"}))
    assert any(line.startswith("torch>=") for line in requirements(ROOT / "pyproject.toml", {"pip": "26"}))


def test_a_base_that_is_too_old() -> None:
    with pytest.raises(
        SystemExit, match=r"the base image has torch 2.3.0a0\+nv24, and stages need torch>=2.11: take a newer one"
    ):
        requirements(ROOT / "pyproject.toml", NVIDIA | {"torch": "2.3.0a0+nv24"})
