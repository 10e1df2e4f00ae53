"""Whom the Python processes of a test asked for anything: `watching/sitecustomize.py` in each of them writes it down.

It does not see what a library in C++ connects to; torch does so for its process groups, on the loopback device.
"""

import re
import shutil
from pathlib import Path

HERE = re.compile(r"(127\.0\.0\.1|localhost|::1|0\.0\.0\.0|None)(:\d+)?|unix:.*")


class Watch:
    """Of all processes that have its folder on their PYTHONPATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "watching"
        shutil.copytree(Path(__file__).with_name("flows") / "watching", self.folder, ignore=shutil.ignore_patterns("__*"))

    def programs(self) -> list[str]:
        """The command lines of all that began."""
        return (self.folder / "began.log").read_text().splitlines()

    def outside(self) -> list[str]:
        """What was asked of other machines: what was done, the address, and by which program."""
        lines = (self.folder / "connects.log").read_text().splitlines()
        assert lines, "nothing was watched"
        return [line for line in lines if not HERE.fullmatch(line.split(maxsplit=2)[1])]
