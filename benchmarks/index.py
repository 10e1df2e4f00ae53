"""What the index of samples costs, beside what the reference's way of building it costs on the same machine.

    python benchmarks/index.py            some seconds
    python benchmarks/index.py --rounds 3 fewer turns

One million documents of 1000 tokens, samples of 1024, one epoch and three; and the order of a blend of one million samples.

    ours        documents, samples and shuffle: `build_sample_index`
    shuffles    the floor: the two shuffles of numpy that decide the order, as the reference calls them (int32 and uint32)
    reference   these; its list of the documents, out of a mesh grid; and its walk over them, C++ there, C here, by `cc`
    loop        the blend's order as a loop in Python over lists

All take turns, and the figure is the least of each, in CPU seconds of the process.
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_core_impl.data.blend import blend_order
from megatron_core_impl.data.gpt_dataset import build_sample_index

DOCUMENTS, TOKENS, LENGTH = 1_000_000, 1000, 1024
ROOT = Path(__file__).resolve().parents[1]

WALK = """
#include <stdint.h>
void walk(const int32_t *sizes, const int32_t *order, int32_t length, int64_t samples, int32_t *out) {
  int64_t at = 0; int32_t offset = 0;
  out[0] = 0; out[1] = 0;
  for (int64_t s = 1; s <= samples; s++) {
    int32_t left = length + 1;
    while (left != 0) {
      int32_t here = sizes[order[at]] - offset;
      left -= here;
      if (left <= 0) { offset += left + here - 1; left = 0; } else { at++; offset = 0; }
    }
    out[2 * s] = (int32_t)at; out[2 * s + 1] = offset;
  }
}
"""


def compiled_walk(folder: str) -> Callable[..., None] | None:
    """The walk as the reference's helper does it. None where there is no compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    library = f"{folder}/walk.so"
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=WALK.encode(), check=True)
    walk = ctypes.CDLL(library).walk
    ints = np.ctypeslib.ndpointer(np.int32, flags="C_CONTIGUOUS")
    walk.argtypes, walk.restype = [ints, ints, ctypes.c_int32, ctypes.c_int64, ints], None
    return walk  # type: ignore[no-any-return]


def shuffles(order: np.ndarray, samples: int) -> np.ndarray:
    random = np.random.RandomState(1234)
    random.shuffle(order)
    shuffle = np.arange(samples, dtype=np.uint32)
    random.shuffle(shuffle)
    return order


def loop(weights: list[float], samples: int) -> list[int]:
    taken, order = [0] * len(weights), []
    for i in range(samples):
        place = max(i, 1)
        behind = [weight * place - own for weight, own in zip(weights, taken, strict=True)]
        order.append(behind.index(max(behind)))
        taken[order[-1]] += 1
    return order


def measured(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "index.json")
    options = parser.parse_args()
    results = {}
    sizes = np.full(DOCUMENTS, TOKENS, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        walk = compiled_walk(folder)
        for epochs in (1, 3):
            samples = (epochs * DOCUMENTS * TOKENS - 1) // LENGTH

            def ours(samples: int = samples) -> np.ndarray:
                return build_sample_index(
                    sizes, range(DOCUMENTS), sequence_length=LENGTH, num_samples=samples, seed=1234
                ).samples

            def reference(epochs: int = epochs, samples: int = samples) -> np.ndarray:
                order = np.mgrid[0:epochs, 0:DOCUMENTS][1]
                order[:] = np.arange(DOCUMENTS)
                order = shuffles(order.reshape(-1).astype(np.int32), samples)
                out = np.zeros((samples + 1, 2), np.int32)
                assert walk is not None
                walk(sizes, order, LENGTH, samples, out)
                return out

            def floor(epochs: int = epochs, samples: int = samples) -> np.ndarray:
                return shuffles(np.tile(np.arange(DOCUMENTS, dtype=np.int32), epochs), samples)

            sides: dict[str, Callable[[], object]] = {"ours": ours, "shuffles": floor}
            if walk is not None:
                np.testing.assert_array_equal(ours(), reference())
                sides["reference"] = reference
            results[f"{epochs} epochs"] = measured(sides, options.rounds)
    blends = ([0.7, 0.3], [4.0, 3.0, 2.0, 1.0])
    for weights in blends:
        shares = [weight / sum(weights) for weight in weights]
        sides = {"ours": lambda w=weights: blend_order(w, 10**6), "loop": lambda w=shares: loop(w, 10**6)}  # type: ignore[misc]
        results[f"blend of {len(weights)}"] = measured(sides, min(options.rounds, 2))
    for name, found in results.items():
        print(f"{name:<12}" + "   ".join(f"{side} {seconds:.3f} CPU s" for side, seconds in found.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
