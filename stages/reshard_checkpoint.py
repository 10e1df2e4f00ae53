"""A training checkpoint under another layout: masters, optimizer state and counters, bit for bit, ready to be resumed.

    finetune checkpoint reshard workspace/runs/brisk-otter/train --tp 2 --dp 2 --output moved

Training goes on from a checkpoint of any layout, so this is not needed to change the layout of a run: change it in the
configuration, and run again. It is for who moves a training elsewhere, where each rank's file is to lie on that rank's disk, or
wants it in one file. The new step-NNNNNN lies in the output folder; put into checkpoints/ of a training with the same settings,
the training goes on from it.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_core_impl.checkpoint import training as checkpoints
from megatron_core_impl.config import Layout, ModelConfig, RopeScaling
from stages.checkpoint_contents import locate
from stages.contracts.words import counted, size

AXES = ("tp", "pp", "dp", "vpp")
TOLD_EVERY = 5.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "checkpoint", type=Path,
        help="a checkpoint; or the newest of a folder of them, of a result of train, or of a training that is not finished",
    )  # fmt: skip
    for axis, what in zip(AXES, ("tensor parallel", "pipeline parallel", "data parallel", "parts per pp rank"), strict=True):
        parser.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"{what} [1]")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where step-NNNNNN is made")


def reshard(arguments: argparse.Namespace) -> None:
    """Write the checkpoint anew, and say what became of it.

    Raises:
        ValueError: there is no intact checkpoint, or the layout cannot hold the model.
        OSError: there is one at the target already, or it cannot be written.
    """
    from megatron_core_impl.checkpoint.proven import NotEqual
    from megatron_core_impl.checkpoint.relayout import relayout
    from megatron_core_impl.checkpoint.sharded import open_weights
    from megatron_core_impl.models import families

    folder = find_checkpoint(arguments.checkpoint)
    state = checkpoints.read_state(folder)
    model = model_of(state, folder)
    layout = Layout(**{axis: getattr(arguments, axis) for axis in AXES})
    layout.check(model)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output: {arguments.output} cannot be made: {error.strerror}. Name a folder where you may write"
        ) from error
    try:
        made = relayout(folder, arguments.output, families.tensors(model), layout, progress=_Teller())
    except NotEqual as error:
        raise ValueError(str(error)) from error
    tensors = len(open_weights(made).names)
    bytes_ = sum(path.stat().st_size for path in made.iterdir())
    print(
        f"step {state['step']:,}, {_shown(state['layout'])} → {_shown(vars(layout))}: {counted(tensors, 'tensor')}, "
        f"{size(bytes_)}, bit for bit, in {made}"
    )


def find_checkpoint(path: Path) -> Path:
    """The folder of the training checkpoint that a path means; it need not be called step-NNNNNN.

    Raises:
        ValueError: there is none.
    """
    folder, _ = locate(path)
    if (folder / checkpoints.STATE_FILE).is_file():
        return folder
    raise ValueError(
        f"{path}: holds no training checkpoint. Name the result of a train stage, the .KEY.partial of one that is not "
        "finished, a folder of checkpoints, or a step-NNNNNN"
    )


def model_of(state: dict[str, object], folder: Path) -> ModelConfig:
    """The model that a checkpoint is of.

    Raises:
        DamagedCheckpoint: its state does not tell.
    """
    try:
        fields = dict(state["must_agree"]["model"])  # type: ignore[index]
        scaling = fields.pop("rope_scaling")
        return ModelConfig(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.DamagedCheckpoint(f"{folder / checkpoints.STATE_FILE} does not tell its model: {error}") from error


def _shown(layout: dict[str, int]) -> str:
    return " · ".join(f"{axis} {layout[axis]}" for axis in AXES if axis != "vpp" or layout.get(axis, 1) > 1)


class _Teller:
    """Tells how far the work is, now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: float, total: float, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= TOLD_EVERY:
            self._last = now
            print(f"{100 * done / total:3.0f} %  {text}", file=sys.stderr, flush=True)
