"""Look into stored weights of any form, check them, and cut training checkpoints anew.

    finetune checkpoint inspect workspace/runs/brisk-otter/shard            what is in it, layers alike in one line
    finetune checkpoint inspect workspace/runs/brisk-otter/shard --all      every tensor, and which slice lies in which file
    finetune checkpoint verify  workspace/runs/brisk-otter/train            every file against the digest recorded of it
    finetune checkpoint reshard workspace/runs/brisk-otter/train --tp 2 --output moved

A folder is the result of a stage (of training, its checkpoint), a folder of training checkpoints (the newest counts) or one of
them, a Hugging Face folder, a checkpoint of Megatron-LLM or of Meta.

Exit codes: 0 done, 2 the input is wrong, 3 a file is not what was written.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from megatron_core_impl.checkpoint.digests import file_blake3
from megatron_core_impl.checkpoint.safetensors_io import format_slice
from megatron_core_impl.checkpoint.slicing import shape_of
from megatron_core_impl.checkpoint.training import STATE_FILE, DamagedCheckpoint, is_checkpoint
from stages import reshard_checkpoint
from stages.checkpoint_contents import Contents, Recorded, Stored, contents_of, locate, recorded_of
from stages.contracts import artifacts as a
from stages.contracts.words import counted, size

BAD, DIFFERS = 2, 3
LAYER = re.compile(r"\blayers?\.(\d+)\.")
TOLD_EVERY = 5.0  # seconds, where nobody watches
REDRAWN_EVERY = 0.2


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = commands.add_parser("inspect", help="print what is in a folder of weights, without reading them")
    inspect.add_argument("folder", type=Path, help="see above")
    inspect.add_argument("--all", action="store_true", help="every tensor and its pieces")
    inspect.set_defaults(command=_inspect)
    verify = commands.add_parser("verify", help="hash every file, and compare with what is recorded of it")
    verify.add_argument("folder", type=Path, help="see above")
    verify.set_defaults(command=_verify)
    reshard = commands.add_parser("reshard", help="write a training checkpoint under another layout")
    reshard_checkpoint.add_arguments(reshard)
    reshard.set_defaults(command=_reshard)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except (ValueError, OSError) as error:
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {told}", file=sys.stderr)
        return BAD
    return code


def _reshard(arguments: argparse.Namespace) -> int:
    reshard_checkpoint.reshard(arguments)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    print(describe(contents_of(arguments.folder), every=arguments.all))
    return 0


# ── inspect ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(contents: Contents, *, every: bool) -> str:
    """A folder of weights, for people: tensors of layers that are alike in one line, or every tensor with its pieces."""
    facts = [contents.form, *(f"{axis} {n}" for axis, n in contents.layout.items() if n > 1)]
    if contents.step is not None:
        facts.append(f"step {contents.step:,}")
    numbers = sum(tensor.numbers for tensor in contents.tensors)
    lines = [
        str(contents.folder),
        f"  {' · '.join(facts)}",
        f"  {counted(len(contents.tensors), 'tensor')}, {numbers:,} numbers, {size(contents.bytes)} in "
        f"{', '.join(sorted(contents.itemsizes))}",
        "",
        *(_every_tensor(contents) if every else _alike(contents)),
        "",
        *_files(contents),
    ]
    return "\n".join(lines)


def _alike(contents: Contents) -> list[str]:
    """A line for each kind of tensor: its name, with the layers that have one like it."""
    layers: dict[tuple[str, str, str, str], list[int]] = {}
    for tensor in contents.tensors:
        found = LAYER.search(tensor.name)
        name = f"{tensor.name[: found.start(1)]}*{tensor.name[found.end(1) :]}" if found else tensor.name
        layers.setdefault((name, *_row(tensor)[1:]), []).extend([int(found[1])] if found else [])
    return _table(
        [(name.replace("*", _ranges(numbers)) if numbers else name, *rest) for (name, *rest), numbers in layers.items()]
    )


def _every_tensor(contents: Contents) -> list[str]:
    lines = []
    for line, tensor in zip(_table([_row(tensor) for tensor in contents.tensors]), contents.tensors, strict=True):
        lines.append(line)
        lines += [f"      {file}  {format_slice(piece) if piece else ''}".rstrip() for file, piece in tensor.pieces]
    return lines


def _row(tensor: Stored) -> tuple[str, str, str, str]:
    return tensor.name, tensor.dtype, _shape(tensor.shape), _pieces(tensor)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{n:,}" for n in shape) or "number"


def _pieces(tensor: Stored) -> str:
    if len(tensor.pieces) == 1:
        return ""
    shapes = {None if piece is None else _shape(shape_of(piece)) for _, piece in tensor.pieces}
    told = f" of {shapes.pop()}" if len(shapes) == 1 and None not in shapes else ""
    return f"{len(tensor.pieces)} pieces{told}"


def _ranges(numbers: Sequence[int]) -> str:
    """0-15, or 0-3,8,10-15."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _files(contents: Contents) -> list[str]:
    digests = {recorded.file: recorded.digest.blake3 for recorded in contents.recorded}
    lines = _table([(name, size(count), digests.get(name, "")[:16]) for name, count in contents.files.items()])
    without = [name for name in contents.files if name not in digests]
    if not digests:
        told = "No digests are recorded of these files: this form has none."
    elif without:
        told = f"No digest is recorded of {', '.join(without)}. The others are not compared: finetune checkpoint verify does."
    else:
        told = "BLAKE3 as recorded, begun. The files are not compared with it: finetune checkpoint verify does."
    return [*lines, f"  {told}"]


# ── verify ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _verify(arguments: argparse.Namespace) -> int:
    folder, _ = locate(arguments.folder)
    by_file: dict[str, list[Recorded]] = {}
    try:
        found = recorded_of(arguments.folder)
    except DamagedCheckpoint as error:  # its state, which has the digest of itself
        print(f"error: {error}", file=sys.stderr)
        return DIFFERS
    for recorded in found:
        by_file.setdefault(recorded.file, []).append(recorded)
    if not by_file:
        raise ValueError(f"{folder}: no digests are recorded of its files: a {contents_of(folder).form} has none")
    sizes = {name: found[0].digest.size for name, found in by_file.items()}
    teller = _Teller(sum(sizes.values()))
    largest_first = sorted(by_file, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        faults = dict(
            zip(largest_first, pool.map(lambda name: _fault(folder, by_file[name], teller), largest_first), strict=True)
        )
    teller.clear()
    if is_checkpoint(folder) and STATE_FILE not in by_file:
        sizes[STATE_FILE], faults[STATE_FILE] = (folder / STATE_FILE).stat().st_size, ""
    for line in _table([(name, size(sizes[name]), faults[name] or "ok") for name in sorted(faults)]):
        print(line)
    bad = [name for name in sorted(faults) if faults[name]]
    total = f"{counted(len(faults), 'file')}, {size(sum(sizes.values()))}"
    if not bad:
        known = {*faults, a.ARTIFACT_FILE}
        others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in known)
        verdict = f"what was written; nothing is recorded of {', '.join(others)}" if others else "every one is what was written"
        print(f"{folder}: {total}: {verdict}")
        return 0
    print(f"{folder}: {total}: {len(bad)} {'is' if len(bad) == 1 else 'are'} not what was written")
    for name in bad:
        print(f"error: {folder / name}: {faults[name]}", file=sys.stderr)
    return DIFFERS


def _fault(folder: Path, recorded: Sequence[Recorded], teller: "_Teller") -> str:
    """What is wrong with a file, or nothing."""
    path = folder / recorded[0].file
    try:
        count = path.stat().st_size
    except FileNotFoundError:
        return f"missing, and {recorded[0].by} needs it"
    for _, digest, by in recorded:
        if count != digest.size:
            return f"has {count:,} bytes, {by} says {digest.size:,}"
    found = file_blake3(path, teller)
    for _, digest, by in recorded:
        if found != digest.blake3:
            alike = next(n for n, (one, other) in enumerate(zip(found, digest.blake3, strict=True)) if one != other)
            shown = max(16, alike + 4)
            return f"its BLAKE3 is {found[:shown]}…, {by} says {digest.blake3[:shown]}…"
    return ""


class _Teller:
    """Tells how far the hashing is: in one line that is redrawn on a terminal, in a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._lock = total, 0, Lock()
        self._is_terminal = sys.stderr.isatty()
        self._every = REDRAWN_EVERY if self._is_terminal else TOLD_EVERY
        self._started = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        """Some bytes are done."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < self._every:
                return
            self._last = now
            rate = size(self._done / (now - self._started))
            line = f"{100 * self._done / self._total:3.0f} %  {size(self._done)} of {size(self._total)}, {rate}/s"
            print(
                f"\r\033[K{line}" if self._is_terminal else line,
                end="" if self._is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        """Remove the line that is redrawn."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends as other commands do where the reader of a pipe has seen enough
    sys.exit(main())
