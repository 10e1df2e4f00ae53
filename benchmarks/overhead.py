"""What orchestration costs: a flow of ten stages on an embedded server, beside the bare processes of the same stages.

    python benchmarks/overhead.py            about two minutes
    python benchmarks/overhead.py --rounds 1

The stages are the stand-ins of the tests, which publish small artifacts through the real runtime; each is a process of its own.

    bare       the ten processes one after the other, started with the specs of the flow, nothing around them
    flow       the same, as the flow does it: records, logs, pages, results, report; one at a time, for the times to compare
    cached     the flow again, when every result is there
    import     what `import flows.finetune` takes beyond what Prefect itself does, and `import flows.cli`, which needs none

All take turns, and the figure is the least of each, in seconds on the clock. Exits with 1 where a limit is not met: 1 s per
stage, 1 s to import.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "flows")]

from fake_stages import Script, config  # noqa: E402 (from the folder of the tests)

from flows.launch.environment import stage_environment  # noqa: E402
from flows.records.run_record import RunFolder  # noqa: E402
from flows.server.local import client_environment, serving  # noqa: E402
from stages.contracts.specs import SPECS  # noqa: E402

STAGE = str(ROOT / "tests" / "flows" / "fake_stages.py")
PER_STAGE, TO_IMPORT = 1.0, 1.0  # seconds that are allowed
IMPORTS = {"prefect": "from prefect import flow, task", "flow": "import flows.finetune", "command": "import flows.cli"}


def seconds_of(command: list[str], **options: Any) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - began


def bare(folder: RunFolder) -> float:
    """The stages of a run as nothing but processes, from the specs that it left; its results are removed first."""
    for stage in {spec.STAGE for spec in SPECS.values()}:
        shutil.rmtree(folder.workspace / stage)
    began = time.perf_counter()
    for node in SPECS:
        seconds_of([sys.executable, STAGE, str(folder.spec(node))], env=stage_environment(os.environ, talks_to_hub=False))
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, float]:
    """The least of each, in seconds."""
    found: dict[str, list[float]] = {name: [] for name in ("flow", "bare", "cached", *(f"import {name}" for name in IMPORTS))}
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        server_workspace = Path(scratch) / "server"
        server_workspace.mkdir()
        with serving(server_workspace) as server:
            os.environ.update(client_environment(server_workspace, server, os.environ))
            from prefect.task_runners import ThreadPoolTaskRunner

            from flows.finetune import finetune
            from flows.launch import choose
            from flows.running.quiet import logs_to_file

            logs_to_file(Path(scratch) / "prefect.log")  # as `finetune run` does
            choose.launcher_for = lambda config: Script(grace=5.0)
            one_at_a_time = finetune.with_options(task_runner=ThreadPoolTaskRunner(max_workers=1))
            for number in range(rounds):
                workspace = Path(scratch) / f"round-{number}"
                for name, run in (("flow", "first"), ("cached", "again")):
                    began = time.perf_counter()
                    one_at_a_time(config=config(workspace), run_name=f"{run}-{number}")
                    found[name].append(time.perf_counter() - began)
                found["bare"].append(bare(RunFolder(workspace, f"first-{number}")))
                for name, code in IMPORTS.items():
                    found[f"import {name}"].append(seconds_of([sys.executable, "-c", code], cwd=ROOT))
    return {name: min(times) for name, times in found.items()}


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "overhead.json")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    stages = len(SPECS)
    figures = found | {
        "per stage": (found["flow"] - found["bare"]) / stages,
        "import beyond prefect": found["import flow"] - found["import prefect"],
    }
    print(f"{stages} stages, the least of {arguments.rounds} rounds, in seconds\n")
    for name, value in figures.items():
        print(f"  {name:<22} {value:6.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    is_met = figures["per stage"] <= PER_STAGE and figures["import beyond prefect"] <= TO_IMPORT
    print(f"\n{'within' if is_met else 'OVER'} the limits: {PER_STAGE:g} s per stage, {TO_IMPORT:g} s to import beyond Prefect")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
