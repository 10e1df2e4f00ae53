"""Safetensors files: the `safetensors` library is the oracle, and what is malformed is refused in words."""

import json
import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_core_impl.checkpoint import safetensors_io
from megatron_core_impl.checkpoint.digests import QUEUED, FileDigest, Follower
from megatron_core_impl.checkpoint.dtypes import DTYPES, dtype_of
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsReader, SafetensorsWriter, WeightsError
from megatron_core_impl.checkpoint.slicing import Slice, row_blocks, shape_of


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of random bits, NaNs of every kind included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same(a: Tensor, b: Tensor) -> bool:
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    shapes = [(5, 7), (3,), (), (4, 0), (2, 3, 5, 4)]
    return {
        f"{code}.{number}": bits(shape, dtype.torch, number)
        for code, dtype in DTYPES.items()
        for number, shape in enumerate(shapes)
    }  # fmt: skip


def test_reads_what_the_library_wrote(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "t.safetensors", {"format": "pt", "note": "Größe"})
    reader = SafetensorsReader(tmp_path / "t.safetensors")
    assert reader.metadata == {"format": "pt", "note": "Größe"}
    assert reader.tensors == {name: (dtype_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())


def test_the_library_reads_what_is_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "t.safetensors"
    with SafetensorsWriter(path, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], {"note": "Größe"}) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "Größe"}
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    assert all(offset % tensors[name].itemsize == 0 for name, offset in SafetensorsReader(path)._offsets.items())


@pytest.mark.parametrize(("block", "skipped"), [(16 << 20, 8 << 10), (64, 1 << 30), (64, 8)])
def test_every_slice_is_the_library_s(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, block: int, skipped: int
) -> None:
    """Also where blocks are smaller than a row, and where columns are read one by one or out of blocks."""
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", block)
    monkeypatch.setattr(safetensors_io, "SKIPPED_BYTES", skipped)
    save_file(tensors, tmp_path / "t.safetensors")
    reader = SafetensorsReader(tmp_path / "t.safetensors")
    choose = random.Random(1)
    for name, tensor in tensors.items():
        for _ in range(30):
            ends = [sorted((choose.randint(0, size), choose.randint(0, size))) for size in tensor.shape]
            piece = tuple((start, stop) for start, stop in ends)
            assert same(reader.read(name, piece), tensor[tuple(slice(*r) for r in piece)]), (name, piece)


@pytest.mark.parametrize(
    ("piece", "allowed"),
    [(((10, 20), (0, 1 << 20)), 10 * 4 << 20), (((0, 1000), (7, 9)), 1000 * 8), (((999, 1000), (5, 6)), 4)],
)
def test_reads_no_more_than_the_slice_of_a_huge_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: Slice, allowed: int
) -> None:
    """A tensor of 4 GiB, all hole: rows, columns of long rows, one number."""
    header = json.dumps({"t": {"dtype": "F32", "shape": [1024, 1 << 20], "data_offsets": [0, 4 << 30]}}).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (4 << 30))
    taken = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal taken
        taken += (count := preadv(descriptor, buffers, offset))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    assert not SafetensorsReader(path).read("t", piece).any()
    assert taken == allowed


def test_narrow_columns_are_read_out_of_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"t": torch.arange(1000 * 64).reshape(1000, 64)}, tmp_path / "t.safetensors")
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", 100 * 512)
    sizes: list[int] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    read = SafetensorsReader(tmp_path / "t.safetensors").read("t", ((0, 1000), (3, 5)))
    assert torch.equal(read, torch.arange(1000 * 64).reshape(1000, 64)[:, 3:5])
    assert sizes == [100 * 512] * 10


def test_leaves_no_descriptor_open(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(4)}, tmp_path / "t.safetensors")
    before = len(list(Path("/proc/self/fd").iterdir()))
    readers = [SafetensorsReader(tmp_path / "t.safetensors") for _ in range(5)]
    kept = [reader.read("t") for reader in readers]
    with pytest.raises(WeightsError):
        readers[0].read("t", ((0, 5),))
    assert len(kept) == 5
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# ── What is malformed ─────────────────────────────────────────────────────────────────────────────────────────────────


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "its header is not JSON"),
    "not text": (b"\xff\xfe\xfa", b"", "its header is not JSON"),
    "nested too deep": (b"[" * 100_000, b"", "its header is not JSON"),
    "no object": ([1, 2], b"", "is not a JSON object"),
    "name twice": (b'{"t":1,"t":2}', b"", "a name occurs twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "must map strings to strings"),
    "entry no object": ({"t": 3}, b"", "t: must have dtype, shape and data_offsets"),
    "entry incomplete": ({"t": {"dtype": "U8"}}, b"", "t: must have dtype, shape and data_offsets"),
    "unknown dtype": ({"t": entry("F4")}, b"1234", "t: dtype 'F4' is unknown; known: F64, F32"),
    "negative size": ({"t": entry(shape=[-4])}, b"1234", r"t: shape \[-4\] must be a list of sizes"),
    "boolean size": ({"t": entry(shape=[True])}, b"1", r"t: shape \[True\] must be a list of sizes"),
    "offsets backwards": ({"t": entry(offsets=[4, 0])}, b"1234", r"data_offsets \[4, 0\] must be \[begin, end\]"),
    "offsets that lie": ({"t": entry("F32")}, b"1234", r"hold 4 bytes, F32 \[4\] needs 16"),
    "offsets too wide": ({"t": entry(shape=[2])}, b"1234", r"hold 4 bytes, U8 \[2\] needs 2"),
    "huge shape": ({"t": entry(shape=[1 << 62, 1 << 62])}, b"1234", "hold 4 bytes, U8"),
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456", "b: .* overlaps the tensor before it"),
    "hole": ({"a": entry(), "b": entry(offsets=[6, 10])}, b"1234567890", "b: .* leaves a hole before it"),
    "data too short": ({"t": entry()}, b"123", "is truncated: its header describes 4 bytes of data, it has 3"),
    "data too long": ({"t": entry()}, b"12345", "has bytes that no tensor owns"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, message = MALFORMED[case]
    path = written(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(WeightsError, match=message) as caught:
        SafetensorsReader(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or no safetensors file: 0 bytes"),
        (b"1234", "is truncated or no safetensors file: 4 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "cannot hold its header"),
        ((100).to_bytes(8, "little") + b"{}", "is truncated or no safetensors file: 10 bytes"),
    ],
)
def test_file_without_a_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        SafetensorsReader(tmp_path / "bad.safetensors")


def test_header_above_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((200_000_000).to_bytes(8, "little"))
    os.truncate(path, 300_000_000)
    with pytest.raises(WeightsError, match="header of 200,000,000 bytes; at most 100,000,000 are legal"):
        SafetensorsReader(path)


def test_missing_file_tensor_and_slice(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors: no such file"):
        SafetensorsReader(tmp_path / "none.safetensors")
    save_file({"t": torch.zeros(4, 6)}, tmp_path / "t.safetensors")
    reader = SafetensorsReader(tmp_path / "t.safetensors")
    with pytest.raises(WeightsError, match=r"t\.safetensors: holds no tensor u"):
        reader.read("u")
    for piece, text in [(((0, 4), (2, 7)), r"\[0:4, 2:7\]"), (((0, 4),), r"\[0:4\]"), (((3, 2), (0, 6)), r"\[3:2, 0:6\]")]:
        with pytest.raises(WeightsError, match=rf"has shape \[4, 6\], so there is no slice {text} of it"):
            reader.read("t", piece)


def test_file_that_became_shorter_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.zeros(4, 6)}, path)
    reader = SafetensorsReader(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightsError, match=r"t\.safetensors: is truncated"):
        reader.read("t")


def test_altered_headers_raise_our_error_or_still_read(tmp_path: Path) -> None:
    """Bytes of the header changed, cut or doubled at random: never another exception, never a huge allocation."""
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(4, 6), "b": torch.ones(3, dtype=torch.int8)}, path, {"k": "v"})
    good = path.read_bytes()
    choose = random.Random(7)
    refused = 0
    for _ in range(400):
        place = choose.randrange(len(good) - 99)
        end = place + choose.randrange(3)
        path.write_bytes(good[:place] + choose.randbytes(choose.randrange(3)) + good[end:])
        try:
            reader = SafetensorsReader(path)
            for name in reader.tensors:
                reader.read(name)
        except WeightsError:
            refused += 1
    assert refused > 200


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_in_any_order_from_any_memory_layout(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).reshape(6, 10)
    with SafetensorsWriter(tmp_path / "t.safetensors", [("t", torch.float32, (10, 6))]) as writer:
        writer.write_rows("t", 7, tensor.T[7:])
        writer.write_rows("t", 0, tensor.T[:7].requires_grad_())
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], tensor.T)


def fail_by(action: Callable[[SafetensorsWriter], None], path: Path) -> None:
    with SafetensorsWriter(path, [("t", torch.float32, (4, 2)), ("u", torch.float32, ())]) as writer:
        action(writer)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda writer: writer.write("t", torch.zeros(4, 2)), "u was not written completely"),
        (lambda writer: writer.write("t", torch.zeros(4, 3)), "does not fit its entry"),
        (lambda writer: writer.write("t", torch.zeros(4, 2).half()), "does not fit its entry"),
        (lambda writer: writer.write_rows("t", 3, torch.zeros(2, 2)), "more rows written than its shape"),
    ],
)
def test_failed_file_does_not_stay(tmp_path: Path, action: Callable[[SafetensorsWriter], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fail_by(action, tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_row_blocks_cover_a_slice_within_the_limit() -> None:
    piece = ((3, 20), (4, 9))
    blocks = list(row_blocks(piece, itemsize=2, limit=40))
    assert [block[0] for block in blocks] == [(3, 7), (7, 11), (11, 15), (15, 19), (19, 20)]
    assert all(block[1:] == piece[1:] for block in blocks)
    assert [shape_of(block)[0] for block in row_blocks(piece, itemsize=2, limit=1)] == [1] * 17
    assert list(row_blocks((), itemsize=4)) == [()]


# ── Digests ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_in_order", [True, False])
def test_digest_is_that_of_the_file(tmp_path: Path, tensors: dict[str, Tensor], is_in_order: bool) -> None:
    """Taken while it was written; of a file written back to front, read again."""
    path = tmp_path / "t.safetensors"
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        with pytest.raises(ValueError, match="has no digest before it is complete"):
            _ = writer.digest
        for name in writer.names if is_in_order else reversed(writer.names):
            writer.write(name, tensors[name])
    assert writer.digest == FileDigest(path.stat().st_size, blake3(path.read_bytes()).hexdigest())


def test_a_file_written_in_order_is_not_read_for_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "file_blake3", lambda path: "read")
    with SafetensorsWriter(tmp_path / "t.safetensors", [("a", torch.float32, (4, 2)), ("b", torch.int8, (3,))]) as writer:
        writer.write_rows("a", 0, torch.ones(3, 2))
        writer.write_rows("a", 3, torch.ones(1, 2))
        writer.write("b", torch.ones(3, dtype=torch.int8))
    assert writer.digest.blake3 == blake3(writer.path.read_bytes()).hexdigest()
    with SafetensorsWriter(tmp_path / "t.safetensors", [("a", torch.float32, (4, 2))]) as writer:
        writer.write_rows("a", 3, torch.ones(1, 2))
        writer.write_rows("a", 0, torch.ones(3, 2))
    assert writer.digest.blake3 == "read"


def test_a_writer_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    for fails in (False, True):
        with suppress(KeyError), SafetensorsWriter(tmp_path / "t.safetensors", [("a", torch.float32, (1,))]) as writer:
            writer.write("b" if fails else "a", torch.ones(1))
    assert threading.active_count() == before


def test_a_job_that_fails_is_told_and_holds_nobody_up() -> None:
    """Whatever it raises: a thread that had died would let its caller wait for ever."""

    def stopped() -> None:
        raise KeyboardInterrupt

    done: list[int] = []
    with Follower() as follower:
        follower.do(stopped)
        for number in range(3 * QUEUED):
            follower.do(partial(done.append, number))
        follower.wait()
        with pytest.raises(KeyboardInterrupt):
            follower.check()
    assert done == list(range(3 * QUEUED))
