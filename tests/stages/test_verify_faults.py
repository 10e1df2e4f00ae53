"""Faults in weights and configuration: each fails the gate, and is told by its place and its cause."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from workspaces import HEAD_DIM, HIDDEN, Tensors, check, make_workspace

from megatron_core_impl.layers.mlp import MLP
from stages.contracts.process import ExitCode
from stages.outcomes import GateFailed


def swap_heads(weights: Tensors) -> None:
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    q[: 2 * HEAD_DIM] = q[: 2 * HEAD_DIM].roll(HEAD_DIM, 0)


def interleave(weights: Tensors) -> None:
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = w.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(w.shape).contiguous()


def swap_gate_and_up(weights: Tensors) -> None:
    gate, up = (f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def transpose(weights: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name].t().contiguous()


def shift_vocabulary(weights: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].roll(1, 0)


def shift_head(weights: Tensors) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(-1, 0)


@pytest.mark.parametrize(
    ("fault", "place", "cause"),
    [
        (swap_heads, r"layer 1 \(model\.layers\.1\.self_attn\).*; layer 0 agrees to \d\.\de-0[67]\.",
         "Heads of q_proj are those of transformers in another order: 1, 0, 2, 3."),
        (interleave, r"layer 0 \(model\.layers\.0\.self_attn\).*attention output.*; the embedding agrees exactly\.",
         "Rows of k_proj and q_proj are in the interleaved RoPE convention"),
        (swap_gate_and_up, r"layer 2 \(model\.layers\.2\.mlp\).*mlp output.*; layers 0-1 agree to \d\.\de-0[67]\.",
         "gate_proj and up_proj are swapped."),
        (transpose, r"layer 0 \(model\.layers\.0\.self_attn\)", "o_proj is that of transformers transposed."),
        (shift_vocabulary, r"the embedding output \(model\.embed_tokens\).*of its size\)\.",
         "Rows of embed_tokens are those of transformers shifted by one."),
        (shift_head, r"the logits \(lm_head\).*; layers 0-2 agree to \d\.\de-0[67]\.",
         "Rows of lm_head are those of transformers shifted by one."),
    ],
)  # fmt: skip
def test_fault_in_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Tensors], None], place: str, cause: str
) -> None:
    workspace = make_workspace(tmp_path, edit=fault)
    with pytest.raises(GateFailed) as caught:
        check(workspace)
    message = str(caught.value)
    assert caught.value.code == ExitCode.GATE_FAILED
    assert re.match(rf"gate failed at {place}", message, re.DOTALL), message
    assert re.search(r"mean \|Δlogit\| \d[\d.]*, allowed 1e-04", message)
    assert cause in message
    spec = workspace.verify_spec()
    report_file = spec.folder.parent / f".{spec.key}.failed.json"
    assert message.endswith(f"Report: the table in the log, and {report_file}")
    report = json.loads(report_file.read_text())
    assert report["passed"] is False
    assert f"({report['first_difference']})" in message
    assert report["hint"] in message
    left = [f".{spec.key}.{end}" for end in ("failed.json", "failed.md", "lock")]
    assert sorted(p.name for p in spec.folder.parent.iterdir()) == left
    assert "Verdict: **failed**" in report_file.with_suffix(".md").read_text()
    table = capsys.readouterr().out
    assert re.search(r"^model\.layers\.0\.self_attn +\d\.\de", table, re.MULTILINE)


def test_wrong_theta(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, facts={"rope_theta": 1e6})
    with pytest.raises(GateFailed) as caught:
        check(workspace)
    message = str(caught.value)
    assert message.startswith("gate failed at layer 0 (model.layers.0.self_attn): ")
    assert "the error grows along the sequence from 0 at position 0" in message
    assert "Our model is built with rope_theta=1000000.0, config.json says 10000.0." in message


def test_fault_that_hardly_moves_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With weights this small attention looks everywhere alike, whatever the queries are."""
    workspace = make_workspace(tmp_path, edit=swap_heads, initializer_range=0.005)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(model\.layers\.1\.self_attn\): "):
        check(workspace)
    log = capsys.readouterr().out
    assert "passed  mean |Δlogit|" in log
    assert "FAILED  largest relative error of a module" in log


def test_what_a_person_allows_passes_but_for_what_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tolerance is for how things are computed. Whether tensors are the same is no matter of tolerance."""
    allowed = {"max_mean_error": 1e3, "max_loss_difference": 1e3, "min_argmax_agreement": 0.0}
    workspace = make_workspace(tmp_path, edit=swap_heads)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(.*\.self_attn\): number of tensors that differ"):
        check(workspace, **allowed)
    assert "FAILED  number of tensors that differ from their source 1, allowed 0" in capsys.readouterr().out
    workspace = make_workspace(tmp_path / "sound")
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(GateFailed, match=r"gate failed at layer 0 \(model\.layers\.0\.mlp\): mean"):
        check(workspace)
    assert check(workspace, **allowed).mean_error > 1e-3


def test_fault_in_bf16(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, edit=swap_gate_and_up)
    with pytest.raises(
        GateFailed, match=r"gate failed at layer 2 \(model\.layers\.2\.mlp\): mean \|Δlogit\| 0\.\d+, allowed 5e-02"
    ):
        check(workspace, precision="bf16")


def test_faults_below_what_bf16_rounds_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logits of small weights pass whatever is wrong. Three other gates do not: on tensors, on config.json, on rounding."""
    tiny = {"initializer_range": 0.005}
    workspace = make_workspace(tmp_path / "tensor", edit=swap_heads, **tiny)
    with pytest.raises(GateFailed, match=r"gate failed at layer 1 \(model\.layers\.1\.self_attn\): number of") as caught:
        check(workspace, precision="bf16")
    assert "passed  mean |Δlogit|" in capsys.readouterr().out
    assert "in another order: 1, 0, 2, 3" in str(caught.value)

    def nudge(weights: Tensors) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1e-7

    workspace = make_workspace(tmp_path / "bit", edit=nudge, **tiny)
    with pytest.raises(GateFailed) as caught:
        check(workspace, precision="bf16")
    assert str(caught.value).startswith(
        "gate failed at layer 2 (model.layers.2.mlp): number of tensors that differ from their source 1, allowed 0\n"
        "       First of them: model.layers.2.mlp.up_proj.weight. What is computed from it differs by no more than rounding "
    )

    workspace = make_workspace(tmp_path / "config", facts={"norm_eps": 2e-6}, **tiny)
    with pytest.raises(GateFailed, match=r"Our model is built with rms_norm_eps=2e-06, config.json says 1e-06"):
        check(workspace, precision="bf16", max_mean_error=1.0)

    workspace = make_workspace(tmp_path / "computation", **tiny)
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) * 1.05)
    with pytest.raises(GateFailed) as caught:
        check(workspace, precision="bf16")
    assert str(caught.value).startswith(
        "gate failed at layer 0 (model.layers.0.mlp): largest error of a module, in those of transformers' rounding"
    )
