"""What an image has to install, for pip: `python requirements.py FOLDER` writes requirements.txt and constraints.txt there.

The requirements are those of `pyproject.toml` that a stage has: the package's own, and `core`. The constraints are the
project's, `constraints.txt`. What a base image brings of its own and must keep is left out of the first, once it is new enough,
and pinned by the second: NVIDIA's PyTorch was built with NVIDIA's libraries, against its numpy.
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # pip is there before anything is installed
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).parents[1]
OF_THE_BASE = ("torch", "flash-attn", "triton", "numpy", "nvidia-", "pytorch-triton", "transformer-engine", "apex")

Installed = dict[str, str]  # name -> version


def kept(installed: Installed) -> Installed:
    """What the base image has and must keep."""
    return {name: version for name, version in installed.items() if name.startswith(OF_THE_BASE)}


def requirements(project: Path, installed: Installed) -> list[str]:
    """What stages need and the base image does not bring.

    Raises:
        SystemExit: it brings something that is too old.
    """
    table = tomllib.loads(project.read_text())["project"]
    base, wanted = kept(installed), []
    for line in [*table["dependencies"], *table["optional-dependencies"]["core"]]:
        needed = Requirement(line)
        version = base.get(_name(needed.name))
        if version is None:
            wanted.append(line)
        elif not needed.specifier.contains(Version(version).base_version):  # 2.12.0a0+nv26.05 is NVIDIA's word for 2.12.0
            sys.exit(f"error: the base image has {needed.name} {version}, and stages need {line}: take a newer one (BASE)")
    return wanted


def constraints(pins: Path, installed: Installed) -> list[str]:
    """The project's pins, but for what the base image must keep, which is pinned to what is there."""
    base = kept(installed)
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    ours = [line for line in lines if _name(line.partition("==")[0]) not in base]
    return [*ours, *(f"{name}==={version}" for name, version in sorted(base.items()))]


def _name(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def main(target: Path) -> None:
    installed = {_name(each.metadata["Name"]): each.version for each in metadata.distributions()}
    (target / "requirements.txt").write_text("\n".join(requirements(ROOT / "pyproject.toml", installed)) + "\n")
    (target / "constraints.txt").write_text("\n".join(constraints(ROOT / "constraints.txt", installed)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
