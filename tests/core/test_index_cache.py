"""Indices that are kept: what decides them, several processes at once, damage, and folders that cannot be written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_core_impl.data.index_cache import KEY_FILE, Arrays, cached

KEY = {"data": "f", "documents": [0, 5]}


class Maker:
    """Makes the same arrays, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Arrays:
        self.count += 1
        return {"a": np.arange(10, dtype=np.int32), "b": np.array([[1, 2], [3, 4]], np.int64)}


def entry_of(folder: Path) -> Path:
    (file,) = folder.glob(f"*/{KEY_FILE}")
    return file.parent


def check(found: Arrays) -> None:
    expected = Maker()()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_is_made_once_and_mapped(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = cached(tmp_path / "cache", KEY, make)
        check(found)
        assert type(found["a"]) is np.ndarray
        assert isinstance(found["a"].base, np.memmap)
        assert not found["a"].flags.writeable
    assert make.count == 1
    assert json.loads((entry_of(tmp_path / "cache") / KEY_FILE).read_text())["documents"] == [0, 5], "people can read it"


def test_everything_in_the_key_counts(tmp_path: Path) -> None:
    make = Maker()
    for key in (KEY, KEY | {"data": "g"}, KEY | {"documents": [0, 6]}, KEY | {"seed": 1}):
        cached(tmp_path, key, make)
    assert make.count == 4


def test_without_a_folder_nothing_is_kept() -> None:
    make = Maker()
    for _ in range(2):
        check(cached(None, KEY, make))
    assert make.count == 2


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip(entry / "a.npy"),
        lambda entry: (entry / "a.npy").write_bytes((entry / "a.npy").read_bytes()[:-4]),
        lambda entry: (entry / "b.npy").write_bytes(b""),
        lambda entry: (entry / "b.npy").unlink(),
        lambda entry: (entry / KEY_FILE).unlink(),
        lambda entry: (entry / KEY_FILE).write_text("{"),
        lambda entry: (entry / KEY_FILE).write_text("[]"),
    ],
)
def test_damage_is_mended(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make = Maker()
    cached(tmp_path, KEY, make)
    damage(entry_of(tmp_path))
    check(cached(tmp_path, KEY, make))
    check(cached(tmp_path, KEY, make))
    assert make.count == 2


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    cached(tmp_path, KEY, Maker())
    entry = entry_of(tmp_path)
    entry.rename(entry.parent / f".{entry.name}.tmp")
    make = Maker()
    check(cached(tmp_path, KEY, make))
    assert make.count == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".{entry.name}.lock", entry.name]


PROCESS = """
import sys
from pathlib import Path
import numpy as np
from megatron_core_impl.data.index_cache import cached

folder = Path(sys.argv[1])

def make():
    with (folder / "made").open("a") as file:
        file.write("x")
    return {"a": np.random.RandomState(1).permutation(300_000)}

print("ready", flush=True)
sys.stdin.readline()
print(int(cached(folder / "cache", {"data": "f"}, make)["a"][:100].sum()), flush=True)
"""


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    expected = int(np.random.RandomState(1).permutation(300_000)[:100].sum())
    assert [int(process.communicate()[0]) for process in processes] == [expected] * 4
    assert (tmp_path / "made").read_text() == "x"


def test_an_error_while_making_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise ValueError("less than one sample")

    with pytest.raises(ValueError, match="less than one sample"):
        cached(tmp_path, KEY, fail)
    assert not list(tmp_path.glob("[!.]*"))
    check(cached(tmp_path, KEY, Maker()))
