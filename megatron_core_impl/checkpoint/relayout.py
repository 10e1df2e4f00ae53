"""A training checkpoint under another layout: masters, optimizer moments and state, ready to be resumed.

Training reads a checkpoint of any layout, so nobody has to do this in order to go on. It makes what the other layout itself
would have written: one file per rank of it, to move a training to another machine, or one file of everything. Moments are cut
as the parameters they belong to.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree

from megatron_core_impl.checkpoint import training
from megatron_core_impl.checkpoint.proven import Progress
from megatron_core_impl.checkpoint.reshard import reshard
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout, TensorSpec


def relayout(
    source: Path, target: Path, specs: Sequence[TensorSpec], layout: Layout, *, progress: Progress
) -> Path:  # fmt: skip
    """Write a checkpoint as another layout would have, and prove every bit of it by reading it back.

    One block of rows is in memory at a time. The checkpoint appears whole or not at all.

    Args:
        source: the checkpoint; its files are compared with their digests first.
        target: another folder of checkpoints, which may be new: step-NNNNNN is made in it.
        specs: the tensors of the model.

    Returns:
        Folder of the new checkpoint.

    Raises:
        DamagedCheckpoint: a file of the source is not what was written.
        WeightsError: the checkpoint is not of this model.
        NotEqual: what lies on the disk now differs from the source.
        FileExistsError: the target has a checkpoint of this step.
    """
    state = training.read_state(source)
    step = state["step"]
    final, unfinished = training.step_folder(target, step), training.unfinished_folder(target, step)
    if final.exists():
        raise FileExistsError(f"{final} is there already: name another folder, or remove it first")
    training.check_files(source, training.recorded_files(source, state))
    reader = open_weights(source)
    rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        reshard(reader, unfinished, state_specs(source, reader.names, specs), layout, progress=progress, step=step)
        training.commit(target, step, {**state, "layout": asdict(layout)}, keep=sys.maxsize)
    except BaseException:
        rmtree(unfinished, ignore_errors=True)
        raise
    return final


def state_specs(folder: Path, names: Iterable[str], specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The tensors of a training checkpoint: of a parameter the master under its own name, moments as `exp_avg.<name>`.

    Raises:
        WeightsError: one of them belongs to no parameter of the model.
    """
    of = {spec.name: spec for spec in specs}
    found = []
    for name in names:
        spec = of.get(name) or of.get(name.partition(".")[2])
        if spec is None:
            raise WeightsError(f"{folder}: holds {name}, which belongs to no tensor of the model in its state.json")
        found.append(replace(spec, name=name))
    if missing := of.keys() - {spec.name for spec in found}:
        raise WeightsError(f"{folder}: lacks {min(missing)}, which the model in its state.json has")
    return found
