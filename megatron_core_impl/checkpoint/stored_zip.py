"""ZIP archives as PyTorch makes them: where the bytes of a member lie, and whether they are still those that were written.

Nothing in them is compressed, so a member is read at its place in the file. The directory at the end of an archive has a CRC-32
of each member. PyTorch writes these and compares none of them when it reads; here a member is compared before it is used. No
torch in here.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

READ_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, lengths of the name and of the extra field that follow it
_SIGNATURE = b"PK\x03\x04"
# What `zipfile` raises beside BadZipFile where a directory is damaged: it seeks and decodes as it is told there.
_OF_DAMAGE = (ValueError, NotImplementedError, EOFError, RuntimeError, OverflowError, OSError)


class StoredZip:
    """An archive without compression.

    Attributes:
        sizes: bytes of each member, by name.
        has_checksums: not where it was written after `torch.serialization.set_crc32_options(False)`: all are zero then.

    Raises:
        BadZipFile: it is none, or a member is compressed.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:  # what the system says of the file itself is told as it is
            try:
                self._members = {member.filename: member for member in ZipFile(file).infolist()}
            except _OF_DAMAGE as error:
                raise BadZipFile(str(error) or type(error).__name__) from None
        for name, member in self._members.items():
            if member.compress_type != ZIP_STORED or member.flag_bits & 1:
                raise BadZipFile(f"{name[:100]} in it is compressed or encrypted, which PyTorch never does")
        self.sizes = {name: member.file_size for name, member in self._members.items()}
        self.has_checksums = any(member.CRC for member in self._members.values())
        self._checked: set[str] = set()

    def place(self, name: str) -> int:
        """Where in the file a member's bytes begin.

        Raises:
            BadZipFile: they do not lie inside the file.
        """
        offset = self._members[name].header_offset
        with self.path.open("rb") as file:
            file.seek(max(offset, 0))
            header = file.read(_LOCAL_HEADER.size)
        if offset < 0 or len(header) < _LOCAL_HEADER.size or header[:4] != _SIGNATURE:
            raise BadZipFile(f"{name} is damaged: it has no header")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
        if start + self.sizes[name] > self.path.stat().st_size:
            raise BadZipFile(f"{name} is damaged: it reaches beyond the end of the file")
        return start

    def check(self, name: str) -> None:
        """Compare a member's bytes with its checksum: the first time, and with a block of them in memory.

        Raises:
            BadZipFile: they differ; the message names the member.
        """
        if not self.has_checksums or name in self._checked:
            return
        found = 0
        for block in self._blocks(name):
            found = zlib.crc32(block, found)
        if found != (recorded := self._members[name].CRC):
            raise BadZipFile(f"{name} is damaged: its CRC-32 is {found:08x}, the archive's directory says {recorded:08x}")
        self._checked.add(name)

    def read(self, name: str) -> bytes:
        """The bytes of a member, compared with its checksum. For small ones."""
        self.check(name)
        return b"".join(bytes(block) for block in self._blocks(name))

    def _blocks(self, name: str) -> Iterator[memoryview]:
        block, left = memoryview(bytearray(READ_BYTES)), self.sizes[name]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.place(name))
            while left and (count := file.readinto(block[:left])):
                yield block[:count]
                left -= count
        if left:
            raise BadZipFile(f"{name} is damaged: {left:,} bytes of it are missing")
