"""PyTorch's files (`.pth`, `.pt`) without unpickling: what they hold, and where in the file the numbers lie. No torch in here.

Since PyTorch 1.6 such a file is a ZIP archive without compression: NAME/data.pkl, the pickle, whose tensors refer to storages;
NAME/data/KEY, the bytes of each storage; NAME/version and NAME/byteorder. So a tensor is read at its place in the file, and
memory holds what is asked for only. The pickle is read by `restricted_pickle`: nothing in it is run.
"""

import struct
import zipfile
from pathlib import Path
from typing import Any

from megatron_core_impl.checkpoint.restricted_pickle import MAX_BYTES, RefusedPickle, Storage, load

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, lengths of the name and of the extra field that follow it
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled magic number


class TorchArchive:
    """A PyTorch file.

    Attributes:
        content: what its pickle holds, tensors as `TensorRecord`s.

    Raises:
        RefusedPickle: it is no such file, damaged, or its pickle holds what no checkpoint needs; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
                (pickled,) = (name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1)
                self._name = pickled.removesuffix("/data.pkl")
                if self._members[pickled].file_size > MAX_BYTES:
                    raise RefusedPickle(f"is larger than {MAX_BYTES:,} bytes")
                order = f"{self._name}/byteorder"
                if order in self._members and (self._members[order].file_size != 6 or archive.read(order) != b"little"):
                    raise RefusedPickle("holds big-endian numbers, which are not supported")
                self.content: Any = load(archive.read(pickled))
        except FileNotFoundError:
            raise RefusedPickle(f"{path}: no such file") from None
        except RefusedPickle as error:
            raise RefusedPickle(f"{path}: {error}") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, OSError) as error:
            raise RefusedPickle(f"{path}: {_no_archive(path, error)}") from None

    def place(self, storage: Storage) -> int:
        """Where in the file the numbers of a storage begin.

        Raises:
            RefusedPickle: the archive does not hold as many.
        """
        member = self._members.get(f"{self._name}/data/{storage.key}")
        size = storage.size * SIZES[storage.dtype]
        if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size < size or member.header_offset < 0:
            raise RefusedPickle(f"{self.path}: is damaged: storage {storage.key[:20]} does not hold {size:,} bytes")
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                raise RefusedPickle(f"{self.path}: is damaged: storage {storage.key[:20]} has no header")
            _, name, extra = _LOCAL_HEADER.unpack(header)
        return member.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _no_archive(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if start == _OLD_FORMAT:
        return (
            "is in PyTorch's format before 1.6, which is not read. Where you trust it, load it with PyTorch and save it again: "
            "torch.save(torch.load(file, map_location='cpu', weights_only=False), file)"
        )
    return f"is no intact PyTorch file ({error})"
