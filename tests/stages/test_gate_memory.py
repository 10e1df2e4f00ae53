"""The gate where memory does not hold a model: layer by layer, with the same figures, and never two models at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from workspaces import Workspace, make_workspace

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.host_memory import available_bytes
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.parity.probes import Batch
from stages import both_models, gate, runtime, verify
from stages.contracts import artifacts as a
from stages.outcomes import BadInput

FALCON = {
    "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96,
}  # fmt: skip

# Compares a model of 400 MB with itself, where there seems to be no memory and where there is, and tells how much more each
# took than what was there. In this order, for what is freed is given back to the system but for a little.
MEASURED = """
import ctypes, json, sys
import torch
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.parity.compare import compare
from megatron_core_impl.parity.expected import Expected
from megatron_core_impl.parity.probes import Batch
from megatron_core_impl.parity.record import record
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models import families
from pathlib import Path
from stages import both_models

def peak():  # of this program: what getrusage tells begins with what the process had that started it
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

folder = Path(sys.argv[1])
both_models.quiet_transformers().LlamaForCausalLM  # imports it
hf = json.loads((folder / "config.json").read_text())
config = families.config_from_hf(hf)
parameters = families.count_parameters(config)
batches = [Batch.of("data", torch.randint(1000, (1, 65), generator=torch.Generator().manual_seed(k))) for k in range(2)]

def measured(free, store):
    both_models.available_bytes = lambda: free
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    oracle = both_models.oracle_of(
        folder, "fp32", parameters=parameters, vocab_size=config.vocab_size, new_rows="mean", rounded_to=None
    )
    record(oracle, batches, Expected(store))
    del oracle
    after_reference = peak()
    compare(both_models.load_ours(config, folder, "fp32", Mesh.single()), batches, Expected(store))
    return {"bytes": 4 * parameters, "reference": after_reference - before, "both": peak() - before}

print(json.dumps([measured(0.0, Path(sys.argv[2])), measured(1e12, Path(sys.argv[3]))]))
"""


def write_large_model(folder: Path) -> None:
    """A Llama of 400 MB in 16 layers, in bf16 on the disk."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=1792, num_hidden_layers=16, num_attention_heads=12,
        max_position_embeddings=128, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def test_takes_a_fraction_of_the_model(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("model", "streamed", "whole")]
    write_large_model(folders[0])
    for folder in folders[1:]:
        folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *folders], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    streamed, whole = json.loads(done.stdout.splitlines()[-1])
    assert streamed["bytes"] == pytest.approx(4e8, rel=0.15)
    assert streamed["both"] < 0.5 * streamed["bytes"]
    assert 0.9 * whole["bytes"] < whole["reference"]  # it does measure
    assert whole["both"] < 1.6 * whole["bytes"]  # one after the other: never two
    (first, *_), (second, *_) = (sorted(folder.iterdir()) for folder in folders[1:])
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(params=["llama", "falcon", "tied"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    models: dict[str, dict[str, Any]] = {"llama": {}, "falcon": FALCON, "tied": {"tie_word_embeddings": True}}
    return make_workspace(tmp_path, **models[request.param])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_streamed_figures_are_the_unstreamed_ones(
    workspace: Workspace, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(batches: int) -> dict[str, Any]:
        spec = workspace.verify_spec(precision=precision, batches=batches)
        runtime.execute(spec, verify.run)
        found: dict[str, Any] = json.loads((spec.folder / "verification.json").read_text())
        return found

    whole = report(1)
    monkeypatch.setattr(both_models, "available_bytes", lambda: 0)
    for name in ("load_transformers", "parallelize"):
        monkeypatch.delattr(both_models, name)  # nothing is loaded whole
    monkeypatch.setattr(both_models, "load_transformers", None, raising=False)
    spec = workspace.verify_spec(precision=precision, batches=1)
    spec.folder.rename(spec.folder.with_name("whole"))
    assert report(1) == whole


def test_a_streamed_model_forgets_its_layers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both_models, "available_bytes", lambda: 0)
    config = ModelConfig(**workspace.weights.model.config_fields())
    ours = both_models.load_ours(config, workspace.weights.folder(workspace.root), "fp32", Mesh.single())
    oracle = both_models.oracle_of(
        workspace.source, "fp32", parameters=1, vocab_size=config.vocab_size, new_rows="mean", rounded_to=None
    )
    batch = Batch.of("data", torch.arange(9).unsqueeze(0))
    logits = oracle.logits(batch)
    torch.testing.assert_close(ours(batch.tokens)[:, : config.vocab_size], logits[0], atol=1e-5, rtol=0)
    for module, layers in ((ours, "model.layers"), (oracle.module, oracle.own_name("model.layers"))):
        is_meta = {name: parameter.is_meta for name, parameter in module.named_parameters()}
        assert {name for name, is_gone in is_meta.items() if is_gone} == {n for n in is_meta if n.startswith(layers + ".")}


def test_a_missing_tensor_is_told_when_streamed(workspace: Workspace) -> None:
    (workspace.source / "model.safetensors").unlink()
    with pytest.raises((BadInput, ValueError), match="no weights"):
        both_models.stream_transformers(workspace.source, "fp32")


def test_no_room_for_the_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path)
    monkeypatch.setattr(gate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        BadInput, match=r"the activations to compare take [\d.]+ MB, and .* has 1\.0 kB free: make room, or lower"
    ):
        runtime.execute(workspace.verify_spec(), verify.run)


def test_activations_are_gone_afterwards(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    artifact = runtime.execute(workspace.verify_spec(), verify.run)
    assert isinstance(artifact, a.VerificationArtifact)
    folder = artifact.folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "verification.json", "verification.md"]


def test_there_is_memory() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_bytes() <= 1024 * total
    code = (
        "import resource; from megatron_core_impl.host_memory import available_bytes as free\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); print(free())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert 0 < int(done.stdout) < 2**30
