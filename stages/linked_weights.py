"""Hugging Face files that are the canonical form as they are: not copied, but given a second name, with our index beside them.

Names and fusion are ours, no row is new, nothing is rounded: then the same bytes need not lie on the disk twice. A hard link
shares the file with the result of download. Neither is ever written in place; removing or replacing one leaves the other.
Should something else write into the file, both results see that it was changed, and refuse it by its digest.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_core_impl.checkpoint.digests import FileDigest, file_blake3
from megatron_core_impl.checkpoint.index import Index, write_index_file
from megatron_core_impl.checkpoint.proven import NotEqual
from megatron_core_impl.checkpoint.sharded import WeightsReader
from megatron_core_impl.config import Layout, Rows, StackedTensor, TensorSpec
from stages.contracts import artifacts as a
from stages.model_files import copy_file

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def is_canonical(files: WeightsReader, specs: Sequence[TensorSpec], table: Iterable[StackedTensor]) -> bool:
    """Whether stored tensors are those of the canonical form, under their names, in safetensors.

    Args:
        table: how canonical tensors are made of stored ones.
    """
    as_it_is = {spec.name: StackedTensor(spec.name, (Rows(spec.name, 0, spec.shape[0]),)) for spec in specs}
    stored = files.index.tensors
    return {stacked.name: stacked for stacked in table} == as_it_is and all(
        stored[spec.name].shape == spec.shape and stored[spec.name].pieces[0].file.endswith(".safetensors") for spec in specs
    )


def link_files(files: WeightsReader, folder: Path, specs: Sequence[TensorSpec], records: dict[str, a.FileRecord]) -> list[str]:
    """Give the files that hold the tensors a second name in a folder, and write the index that points into them.

    Tensors that are not the model's, such as tables of rotary embeddings, stay in the files and out of the index.

    Args:
        files: canonical as it is: see `is_canonical`.
        records: of the files by name. The caller sees to it that they are checked.

    Returns:
        The files, where hard links could be made of all of them; otherwise the file system wanted copies.

    Raises:
        NotEqual: a file had to be copied, and the copy is not what its record says.
    """
    tensors = {spec.name: files.index.tensors[spec.name] for spec in specs}
    names = sorted({piece.file for tensor in tensors.values() for piece in tensor.pieces})
    is_linked = [_link(files.folder / name, folder / name, records[name]) for name in names]
    digests = {name: FileDigest(records[name].size, records[name].blake3) for name in names}
    write_index_file(folder, Index(tensors, digests, {"layout": asdict(Layout())}))
    return names if all(is_linked) else []


def files_of(model: a.ModelArtifact) -> dict[str, a.FileRecord]:
    """The records of the files of a Hugging Face folder, by their names in it."""
    return {name.removeprefix("files/"): record for name, record in model.files.items()}


def _link(source: Path, target: Path, record: a.FileRecord) -> bool:
    """Whether a file could be linked. Otherwise it was copied, and the copy has the file's digest."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    else:
        return True
    copy_file(source, target)
    if file_blake3(target) != record.blake3:
        raise NotEqual(f"{target.name}: its copy differs. The disk or the memory of this machine is not to be trusted")
    return False
