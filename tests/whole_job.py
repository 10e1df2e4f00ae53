"""A small job for the whole pipeline: its configuration, and the text that it learns."""

import random
from pathlib import Path


def job_text(steps: int, length: int, *, samples: int, batch: int, push: str, train: str = "", rest: str = "") -> str:
    """A configuration, on two processes.

    Args:
        length: of a sequence.
        samples, batch: of a micro batch, and of a whole one.
        push: the folder that stands for the Hub.
        train, rest: further lines, of the section or of the whole.
    """
    return f"""
model: {{source: base}}
data: {{source: text}}
verify: {{batches: 1, sequence_length: {length}}}
layout: {{tp: 2}}
train:
  steps: {steps}
  sequence_length: {length}
  micro_batch_size: {samples}
  global_batch_size: {batch}
  lr: 5.0e-3
  precision: fp32
  split: "90,10,0"
  eval_interval: {steps // 2}
  checkpoint_interval: 10
  log_interval: 1
  {train}
push: {{to: folder, folder: {push}}}
{rest}
"""


def write_text(folder: Path) -> None:
    """Forty files of small functions: enough that repeats itself to be learnt in sixty steps."""
    folder.mkdir()
    choose = random.Random(3)
    words = ("apple", "river", "stone", "cloud", "light", "garden")
    for number in range(40):
        functions = [
            f"def {choose.choice(words)}_{choose.choice(words)}(first, second):\n"
            f'    """Add {choose.choice(words)} and {choose.choice(words)}."""\n'
            f"    return first {choose.choice('+-*')} second\n"
            for _ in range(20)
        ]
        (folder / f"{number:02d}.py").write_text("\n\n".join(functions))
