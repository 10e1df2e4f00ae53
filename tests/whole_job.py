"""A small job for the whole pipeline, as a person runs it: its configuration, the text that it learns, and the command."""

import os
import random
import subprocess
import sys
from pathlib import Path

from processes import wait_until
from workspaces import write_model

from flows.records.run_record import RunFolder, RunRecord
from megatron_core_impl.checkpoint.training import finished_steps

ROOT = Path(__file__).parents[1]


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


class Job:
    """A folder with a small model, some text and a configuration, and the `finetune` command in it."""

    def __init__(self, folder: Path, config: str, **environment: str) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment |= {"PYTHONPATH": str(ROOT)} | environment
        (folder / "job.yaml").write_text(config)
        write_model(folder / "base", num_hidden_layers=2)
        write_text(folder / "text")

    def start(self, run: str, *options: str, again: bool = False) -> subprocess.Popen[str]:
        """`finetune run`, or `rerun`, in a process group of its own. What it prints is in a file."""
        asked = ["rerun", run] if again else ["run", "job.yaml", "--name", run]
        command = [sys.executable, "-m", "flows.cli", *asked, *options]
        with self.printed(run).open("w") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, text=True, start_new_session=True, stdout=out, stderr=out
            )
        self.started.append(process)
        return process

    def run(self, run: str, *options: str, again: bool = False) -> RunRecord:
        """`finetune run`, or `rerun`, to its end, which has to be a good one."""
        code = self.start(run, *options, again=again).wait(timeout=600)
        assert code == 0, self.printed(run).read_text()
        return self.record(run)

    def record(self, run: str) -> RunRecord:
        record = RunFolder(self.workspace, run).read()
        assert record is not None
        return record

    def train_log(self, run: str) -> str:
        return RunFolder(self.workspace, run).log("train").read_text()

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint of a training that is not finished; 0: there is none."""
        folders = (self.workspace / "train").glob(".*.partial/checkpoints")
        return max((step for folder in folders for step in finished_steps(folder)), default=0)

    def wait_for_a_checkpoint(self, process: subprocess.Popen[str], run: str, after: int = 0) -> int:
        """Until the training of a run that goes on has saved one, later than a step. Returns its step."""

        def is_there() -> bool:
            assert process.poll() is None, self.printed(run).read_text()
            return self.saved > after

        wait_until(is_there, 600)
        return self.saved

    def printed(self, run: str) -> Path:
        return self.folder / f"{run}.out"
