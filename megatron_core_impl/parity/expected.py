"""What the reference computes, in a folder: a file of fp32 numbers for each batch and point.

It is read back by rows and columns, so that every rank of ours reads what it has computed itself, a block at a time. For a
model of 7 billion parameters and 1024 tokens it takes 1.7 GB.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_core_impl.config import ModelConfig, Range

ROWS = 512  # compared at a time: a large vocabulary makes rows of half a megabyte
ITEM = torch.float32.itemsize


class Expected:
    """Activations in a folder, by number of the batch and name of the point: rows [N, X] of the compared tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, batch: int, point: str, rows: Tensor) -> None:
        """Add rows [R, X] to those of a point."""
        values = rows.detach().to("cpu", torch.float32).contiguous()
        with self._file(batch, point).open("ab") as file:
            file.write(values.numpy().data)

    def blocks(self, batch: int, point: str, rows: Range, width: int) -> Iterator[tuple[Range, Tensor]]:
        """Rows of a point that are `width` numbers wide, some at a time: (which rows, [R, width])."""
        descriptor = os.open(self._file(batch, point), os.O_RDONLY)
        try:
            for start in range(*rows, ROWS):
                stop = min(start + ROWS, rows[1])
                content = bytearray(os.pread(descriptor, (stop - start) * width * ITEM, start * width * ITEM))
                yield (start, stop), torch.frombuffer(content, dtype=torch.float32).view(-1, width)
        finally:
            os.close(descriptor)

    def size(self, batch: int, point: str) -> int:
        """How many numbers there are of a point."""
        return self._file(batch, point).stat().st_size // ITEM

    def _file(self, batch: int, point: str) -> Path:
        return self.folder / f"{batch}-{point}"


def count_bytes(config: ModelConfig, tokens: int) -> int:
    """What the activations of so many compared tokens take in the folder."""
    return ITEM * tokens * ((3 * config.num_hidden_layers + 2) * config.hidden_size + config.vocab_size)
