"""PyTorch's files (`.pth`, `.pt`) without unpickling: what they hold, and where in the file the numbers lie. No torch in here.

Since PyTorch 1.6 such a file is a ZIP archive without compression: NAME/data.pkl, the pickle, whose tensors refer to storages;
NAME/data/KEY, the bytes of each storage; NAME/version and NAME/byteorder. So a tensor is read at its place in the file, and
memory holds what is asked for only. The pickle is read by `restricted_pickle`: nothing in it is run.

A pickle takes time and memory by its length, and what a checkpoint needs of it goes with the number of its storages. One that
is longer is refused before it is read.
"""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from megatron_core_impl.checkpoint.dtypes import NAMES
from megatron_core_impl.checkpoint.restricted_pickle import MAX_BYTES, RefusedPickle, Storage, load
from megatron_core_impl.checkpoint.stored_zip import StoredZip

PICKLE_BYTES, BYTES_PER_STORAGE = 500_000, 4_000  # a tensor takes some 100, arguments 10,000, a generator's state 7,000
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled magic number


class TorchArchive:
    """A PyTorch file.

    Attributes:
        content: what its pickle holds, tensors as `TensorRecord`s.
        has_checksums: whether what was read can be compared with what was written.

    Raises:
        RefusedPickle: it is no such file, damaged, or its pickle holds what no checkpoint needs; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = StoredZip(path)
            self.has_checksums = self._zip.has_checksums
            pickles = [name for name in self._zip.sizes if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise BadZipFile(f"it holds {len(pickles)} pickles")
            pickled = pickles[0]
            self._name = pickled.removesuffix("/data.pkl")
            order = f"{self._name}/byteorder"
            if order in self._zip.sizes and (self._zip.sizes[order] != 6 or self._zip.read(order) != b"little"):
                raise RefusedPickle("holds big-endian numbers, which are not supported")
            storages = sum(name.startswith(f"{self._name}/data/") for name in self._zip.sizes)
            most = min(MAX_BYTES, PICKLE_BYTES + BYTES_PER_STORAGE * storages)
            if self._zip.sizes[pickled] > most:
                raise RefusedPickle(
                    f"its pickle of {self._zip.sizes[pickled]:,} bytes is longer than a checkpoint of {storages:,} storages "
                    f"needs: {most:,}"
                )
            self.content: Any = load(self._zip.read(pickled))
        except FileNotFoundError:
            raise RefusedPickle(f"{path}: no such file") from None
        except RefusedPickle as error:
            raise RefusedPickle(f"{path}: {error}") from None
        except BadZipFile as error:
            raise RefusedPickle(f"{path}: {_no_archive(path, error)}") from None

    def place(self, storage: Storage) -> int:
        """Where in the file the numbers of a storage begin, which are compared with their checksum before.

        Raises:
            RefusedPickle: the archive does not hold as many, or they are not those that were written. The message leaves the
                file to be named.
        """
        name, size = f"{self._name}/data/{storage.key}", storage.size * NAMES[storage.dtype].itemsize
        if self._zip.sizes.get(name, -1) < size:
            raise RefusedPickle(f"is damaged: storage {storage.key[:20]} does not hold {size:,} bytes")
        try:
            self._zip.check(name)
            return self._zip.place(name)
        except BadZipFile as error:
            raise RefusedPickle(str(error)) from None


def _no_archive(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if start == _OLD_FORMAT:
        return (
            "is in PyTorch's format before 1.6, which is not read. Where you trust it, load it with PyTorch and save it again: "
            "torch.save(torch.load(file, map_location='cpu', weights_only=False), file)"
        )
    return f"is no intact PyTorch file ({error})"
