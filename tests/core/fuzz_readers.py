"""Files changed at random, given to their readers: each must be read right or refused in our words.

    python tests/core/fuzz_readers.py FOLDER COUNT

Bytes are flipped, cut, doubled and put in; values of JSON are exchanged for values that hurt. The process may take 300 MB
beyond what it has after importing, and two seconds for a file: what takes more fails as what raises something else. Prints, for
each reader, how many files it refused and how many it read.
"""

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from indexed_writer import IndexedDatasetWriter  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from megatron_core_impl.checkpoint import training as checkpoints  # noqa: E402
from megatron_core_impl.checkpoint.safetensors_io import SafetensorsReader, WeightsError  # noqa: E402
from megatron_core_impl.checkpoint.sharded import open_weights, write_index, write_rank_file  # noqa: E402
from megatron_core_impl.checkpoint.training import DamagedCheckpoint  # noqa: E402
from megatron_core_impl.data.indexed_dataset import IndexedDataset  # noqa: E402

MEMORY, SECONDS = 300_000_000, 2.0
HURTS: list[Any] = [
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 40, 1 << 63, 1 << 64, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "a",
    "..", "/", "../rank-0000.safetensors", "index.json", "\x00", "\ud800", "0" * 64, [], {}, [[]], [0],
    [[0, 1 << 62]], {"a": {}},
]  # fmt: skip


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut out, doubled, put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                del changed[place : place + draw.randrange(1, 9)]
            case 2:
                changed[place:place] = changed[place : place + draw.randrange(1, 40)]
            case 3:
                changed[place:place] = draw.randbytes(draw.randrange(1, 9))
            case 4 if draw.random() < 0.3:
                del changed[place:]
            case _:
                changed[place : place + 8] = draw.choice((0, 1, (1 << 63) - 1, (1 << 63) - 2, (1 << 64) - 1, 1 << 40)).to_bytes(
                    8, "little"
                )
    return bytes(changed)


def change_json(value: Any, draw: random.Random) -> Any:
    """A value somewhere in it exchanged, removed, or put elsewhere."""
    changed = deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(changed)
    for _ in range(draw.choice((1, 1, 2, 4))):
        inner, key = draw.choice(places)
        match draw.randrange(4):
            case 0 if isinstance(inner, dict):
                inner.pop(key, None)
            case 1 if isinstance(inner, dict):
                inner[draw.choice(["w", "v", "files", "tensors", "slice", "x"])] = draw.choice(HURTS)
            case 2:
                other, at = draw.choice(places)
                if at in other if isinstance(other, dict) else at < len(other):
                    value = deepcopy(other[at])
                    if isinstance(inner, dict) or key < len(inner):
                        inner[key] = value
            case _:
                if isinstance(inner, dict) or key < len(inner):
                    inner[key] = draw.choice(HURTS)
    return changed


class Target:
    """A file that is changed, and how it is read: everything, as a user would."""

    def __init__(
        self, path: Path, read: Callable[[], Any], refusal: type[Exception] = WeightsError, *, header: int = 0
    ) -> None:
        self.path, self.read, self.refusal, self.header = path, read, refusal, header
        self.is_json = path.suffix == ".json"
        self.good = path.read_bytes()
        self.answer = read()

    def change(self, draw: random.Random) -> None:
        """Write it anew, changed."""
        if self.is_json and draw.random() < 0.7:
            text = json.dumps(change_json(json.loads(self.good), draw)).encode("utf-8", "surrogatepass")
            self.path.write_bytes(text)
        elif self.header and draw.random() < 0.6:  # the JSON inside, its length right
            text = json.dumps(change_json(json.loads(self.good[8 : self.header]), draw)).encode("utf-8", "surrogatepass")
            self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.good[self.header :])
        else:
            self.path.write_bytes(change_bytes(self.good, draw))

    def restore(self) -> None:
        self.path.write_bytes(self.good)


def targets(folder: Path) -> dict[str, Target]:
    """A file of each kind."""
    root = folder / "checkpoints"
    weights = checkpoints.unfinished_folder(root, 3)
    weights.mkdir(parents=True)
    tensor = torch.arange(24.0).reshape(4, 6)
    write_rank_file(weights, 0, [("w", (4, 6), ((0, 4), (0, 2)), tensor[:, :2]), ("n", (), (), torch.tensor(1.0))])
    write_rank_file(weights, 1, [("w", (4, 6), ((0, 4), (2, 6)), tensor[:, 2:])])
    write_index(weights, layout={"tp": 2}, step=3)
    checkpoints.commit(root, 3, {"step": 3}, keep=9)
    weights = checkpoints.step_folder(root, 3)

    def read_weights() -> list[Any]:
        reader = open_weights(weights)
        return [(name, reader.read(name).tolist()) for name in sorted(reader.names)]

    def read_state() -> list[Any]:
        state = checkpoints.read_state(weights)
        files = checkpoints.recorded_files(weights, state)
        checkpoints.check_files(weights, files)
        return sorted(files.items())

    save_file(
        {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.int8)}, folder / "t.safetensors", {"k": "v"}
    )

    def read_safetensors() -> list[Any]:
        reader = SafetensorsReader(folder / "t.safetensors")
        return [(name, reader.read(name).tolist()) for name in sorted(reader.tensors)]

    hub = folder / "hub"
    hub.mkdir()
    save_file({"a": torch.ones(4)}, hub / "one.safetensors")
    save_file({"b": torch.ones(4)}, hub / "two.safetensors")
    hf_index = hub / "model.safetensors.index.json"
    hf_index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))

    def read_hub() -> list[Any]:
        reader = open_weights(hub)
        return [(name, reader.read(name).tolist()) for name in sorted(reader.names)]

    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for tokens in ([1, 2, 3], [4], [5, 6, 7, 8]):
            writer.add_sequence(tokens)
            writer.end_document()

    def read_idx() -> list[Any]:
        dataset = IndexedDataset(folder / "data")
        for i in range(len(dataset)):
            assert len(dataset[i]) == dataset.sizes[i], f"sequence {i} has {len(dataset[i])} tokens, not {dataset.sizes[i]}"
        return [dataset[i].tolist() for i in range(len(dataset))] + [dataset.doc_idx.tolist()]

    length = 8 + int.from_bytes((folder / "t.safetensors").read_bytes()[:8], "little")
    return {
        "index.json": Target(weights / "index.json", read_weights),
        "state.json": Target(weights / "state.json", read_state, DamagedCheckpoint),
        "safetensors": Target(folder / "t.safetensors", read_safetensors, header=length),
        "rank file": Target(weights / "rank-0001.safetensors", read_weights),
        "index of the Hub": Target(hf_index, read_hub),
        ".idx": Target(folder / "data.idx", read_idx, ValueError),
    }


def too_slow(number: int, frame: object) -> None:
    raise TimeoutError("takes too long")


def main(folder: Path, count: int) -> None:
    """Change files and read them, and print what became of it."""
    everything = targets(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, too_slow)
    found = {}
    for name, target in everything.items():
        refused = read = same = 0
        for seed in range(count):
            target.change(random.Random(f"{name} {seed}"))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                same += target.read() == target.answer
                read += 1
            except Exception as error:
                if not isinstance(error, target.refusal) or str(folder) not in str(error):
                    raise SystemExit(f"{name}, seed {seed}: {error!r}") from error
                refused += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        target.restore()
        assert target.read() == target.answer
        found[name] = {"refused": refused, "read": read, "same": same}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
