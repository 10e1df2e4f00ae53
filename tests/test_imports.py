"""Which part may import which (docs/architecture.md): read from the source, so that a wrong import fails at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = "megatron_core_impl"

STAGES = ("download", "preprocess", "convert", "verify", "shard", "train", "merge", "export", "push")

# Parts of the flows from the bottom up: each may import itself and those before it.
FLOW_LAYERS = [
    "asked", "records", "launch", "server", "show", "running", "tasks", "finetune", "stage_flows", "runner", "commands", "cli",
]  # fmt: skip

# Parts of the core from the bottom up: each may import itself and those before it; `checkpoint` and `data` only the first.
LAYERS = ["config", "mesh", "collectives", "layers", "models", "parallel", "top"]
PART_OF = {
    "config": "config", "shown": "config", "json_files": "config",
    "mesh": "mesh", "collectives": "collectives", "layers": "layers", "models": "models",
    "parallel": "parallel", "optim": "parallel", "loss_scale": "parallel", "trainer": "top", "parity": "top", "metrics": "top",
    "train_config": "top", "train_step": "top", "batches": "top", "resume": "top", "memory": "top", "host_memory": "top",
    "prefetch": "top", "training_data": "top", "training_conversations": "top",
}  # fmt: skip


def modules() -> list[str]:
    files = [f for part in ("flows", "stages", CORE) for f in (ROOT / part).rglob("*.py")]
    return sorted(f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for f in files)


def imports_of(module: str) -> set[str]:
    """Everything that a module imports, anywhere in it, as dotted names; `from a import b` counts as a.b."""
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py").read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; the project uses absolute ones"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offences(module: str, names: set[str]) -> list[str]:
    """The imports that a module should not have."""

    def starts(name: str, *parts: str) -> bool:
        return any(name == part or name.startswith(part + ".") for part in parts)

    package = module.split(".")[0]
    if package == "flows":
        bad = [n for n in names if starts(n, "torch", CORE) or (starts(n, "stages") and not starts(n, "stages.contracts"))]
        bad += [n for n in names if starts(n, "docker") and not module.startswith("flows.launch.docker")]
        part = module.split(".")[1] if "." in module else FLOW_LAYERS[0]
        above = [f"flows.{layer}" for layer in FLOW_LAYERS[FLOW_LAYERS.index(part) + 1 :]]
        return bad + [n for n in names if starts(n, *above)]
    bad = [n for n in names if starts(n, "prefect", "docker", "flows")]
    if starts(module, "stages.contracts"):
        return bad + [n for n in names if starts(n, "torch", "stages.runtime", "stages.context")]
    hub_is_fine = module in ("stages.download", "stages.hub_rows", "stages.hub_upload", "stages.card_metadata")
    if not hub_is_fine:
        bad += [n for n in names if starts(n, "huggingface_hub", "datasets")]
    if package == "stages":
        return bad + [n for n in names if starts(n, *(f"stages.{other}" for other in STAGES)) and not starts(n, module)]
    bad += [n for n in names if starts(n, "stages")]
    part = module.split(".")[1] if "." in module else ""
    theirs = [n.split(".")[1] for n in names if starts(n, CORE) and "." in n]
    if part in ("checkpoint", "data"):
        return bad + [f"{CORE}.{t}" for t in theirs if t != part and PART_OF.get(t) != "config"]
    if part:
        below = LAYERS[: LAYERS.index(PART_OF[part]) + 1]
        bad += [f"{CORE}.{t}" for t in theirs if t not in ("checkpoint", "data", "__version__") and PART_OF[t] not in below]
    return bad


@pytest.mark.parametrize("module", modules())
def test_imports(module: str) -> None:
    assert offences(module, imports_of(module)) == []


def test_the_rules_notice() -> None:
    """The check above can fail."""
    assert offences("flows.tasks", {"torch.nn"}) == ["torch.nn"]
    assert offences("flows.tasks", {"stages.runtime.execute"}) != []
    assert offences("flows.records.story", {"flows.show.charts.bars"}) == ["flows.show.charts.bars"]
    assert offences("flows.show.charts", {"flows.records.story.Story", "flows.show.display"}) == []
    assert offences("stages.train", {"stages.shard.run"}) != []
    assert offences("stages.train", {"prefect.flow"}) != []
    assert offences(f"{CORE}.layers.linear", {f"{CORE}.models.llama"}) != []
    assert offences(f"{CORE}.checkpoint.sharded", {f"{CORE}.models.llama"}) != []


@pytest.mark.parametrize("name", ["slicing"])
def test_pure_arithmetic_imports_no_torch(name: str) -> None:
    assert not any(n.split(".")[0] == "torch" for n in imports_of(f"{CORE}.checkpoint.{name}"))


@pytest.mark.parametrize(
    "module",
    [
        "stages.contracts.specs", "stages.contracts.preflight", "stages.runtime", "stages.download", "stages.push",
        "stages.train", "stages.preprocess", f"{CORE}.models.families", "flows.cli",
    ],
)  # fmt: skip
def test_imports_without_torch(module: str) -> None:
    """Importing these loads no torch, however far down: it takes two seconds. The command line answers at once."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
