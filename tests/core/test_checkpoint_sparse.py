"""A checkpoint of 70B shape that is all holes: planned for 32 ranks, its first and last tensors cut, the rest never read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_core_impl.checkpoint.digests import Follower
from megatron_core_impl.checkpoint.dtypes import dtype_of
from megatron_core_impl.checkpoint.index import Index, Piece, StoredTensor
from megatron_core_impl.checkpoint.proven import Advance, Target, write_tensors
from megatron_core_impl.checkpoint.reshard import plan
from megatron_core_impl.checkpoint.sharded import WeightsReader, count_bytes, open_rank_file, open_weights
from megatron_core_impl.checkpoint.slicing import shape_of
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.models import families

CONFIG = ModelConfig(
    family="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip
SPECS = families.tensors(CONFIG)
FILES = 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the Hub has of such a model: 15 files of 9 GB and their index. They take no room: all data is hole."""
    source = tmp_path / "source"
    source.mkdir()
    weight_map = {}
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        header, end = {}, 0
        for spec in SPECS[number * len(SPECS) // FILES : (number + 1) * len(SPECS) // FILES]:
            begin, end = end, end + 2 * torch.Size(spec.shape).numel()
            header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [begin, end]}
            weight_map[spec.name] = name
        text = json.dumps(header).encode()
        (source / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(source / name, 8 + len(text) + end)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


def bytes_read() -> int:
    """By this process so far, from files that are in memory or hole as well."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def most_memory_of(work: Callable[[], None]) -> int:
    """The most resident memory that something takes, beyond what is there before."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def test_first_and_last_tensors_are_cut_without_reading_the_rest(tmp_path: Path, folder: Path) -> None:
    started = bytes_read()
    reader = open_weights(folder)
    assert count_bytes(reader, reader.names) == 137_953_296_384  # of Llama 2 70B
    ranks = plan(SPECS, Layout(tp=8, pp=4))
    assert bytes_read() - started < 500_000  # headers and index
    numbers = sum(torch.Size(shape_of(piece)).numel() for rank in ranks for piece in rank.values())
    assert numbers == families.count_parameters(CONFIG)

    first, last = SPECS[0].name, SPECS[-1].name
    cut = [(rank, name) for rank in (0, 7, 24, 31) for name in (first, last) if name in ranks[rank]]  # of vocabulary
    assert cut == [(0, first), (7, first), (24, last), (31, last)]
    wanted = sum(2 * torch.Size(shape_of(ranks[rank][name])).numel() for rank, name in cut)
    started = bytes_read()

    def write() -> None:
        for rank, name in cut:
            piece, shape = ranks[rank][name], reader.shape(name)
            entry = (name, torch.bfloat16, shape, piece)
            with Follower() as follower, open_rank_file(tmp_path, rank, [entry], follower) as writer:
                part = StoredTensor(dtype_of("bfloat16"), shape, (Piece(writer.path.name, piece),))
                written = WeightsReader(tmp_path, Index({name: part}, {}, {}), {})
                advance = Advance(lambda *_: None, wanted)
                write_tensors([Target(writer, {name: piece})], reader, None, advance, written, follower)

    memory = most_memory_of(write)
    assert 2 * wanted <= bytes_read() - started < 2 * wanted + 100_000  # once from the source, once to compare
    assert sum((tmp_path / f"rank-{rank:04d}.safetensors").stat().st_size for rank, _ in cut) < wanted + 10_000
    assert memory < 100e6  # of 138e9
