"""`finetune dataset` and `checkpoint`: other programs of ours, which may import what flows must not."""

import argparse
import os
import sys
from typing import NoReturn

from flows.commands.arguments import Add
from flows.launch.environment import python_path

DATASET_HELP = """\
finetune dataset inspect RESULT|PREFIX [--document N]     its documents, tokens and lengths; or the text of a document
finetune dataset merge --output PREFIX RESULT|PREFIX …    datasets one after the other, in one"""

CHECKPOINT_HELP = """\
finetune checkpoint inspect RESULT|FOLDER [--all]     tensors, slices, layout, digests of weights in any form
finetune checkpoint verify  RESULT|FOLDER             every file against the digest that is recorded of it
finetune checkpoint reshard RESULT|FOLDER --tp N …    a training checkpoint under another layout"""


def add_to(add: Add) -> None:
    """Add these commands to the parser."""
    dataset = add("dataset", _dataset, help="look into tokenized datasets, or merge them", description=DATASET_HELP)
    dataset.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="inspect|merge …", help="see: finetune dataset inspect --help"
    )
    about = "look into stored weights, check them, or cut them anew"
    checkpoint = add("checkpoint", _checkpoint, help=about, description=CHECKPOINT_HELP)
    checkpoint.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="inspect|verify|reshard …", help="see: finetune checkpoint inspect --help"
    )


def _dataset(arguments: argparse.Namespace) -> int:
    return _become("stages.dataset", arguments.rest)


def _checkpoint(arguments: argparse.Namespace) -> int:
    return _become("stages.checkpoint", arguments.rest)


def _become(module: str, rest: list[str]) -> NoReturn:
    """`-P`: a folder `stages` in the person's current folder is not ours."""
    sys.stdout.flush()
    environment = {**os.environ, "PYTHONPATH": python_path(os.environ)}
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *(rest or ["--help"])], environment)
