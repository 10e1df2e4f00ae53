"""Compiled layers compute what plain ones do, under any kind of recompute, and all layers share what is compiled."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from activations import CONFIGS, DROPOUT, LLAMA, MODES, NONE, micro_batches, mode_name, model_of
from torch import Tensor

from megatron_core_impl.config import ModelConfig, Recompute
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.compile import compile_layers
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.random import seed_step
from megatron_core_impl.parallel.zero import ZeroOptimizer

BACKEND = "aot_eager"  # traces and differentiates as inductor does, and then calls PyTorch's kernels: nothing to wait for
LAYERS = 8


@pytest.fixture(autouse=True)
def nothing_compiled_yet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    import torch._dynamo.utils

    caplog.set_level(logging.WARNING, "torch.__trace")  # pytest wants all of it otherwise
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(config: ModelConfig, recompute: Recompute) -> Transformer:
    model = model_of(config, recompute, dropout=DROPOUT, dtype=torch.float64)
    compile_layers(model, torch.arange(8), 2, backend=BACKEND)
    return model


def step(model: Transformer) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of evaluation and training, and the gradients that the optimizer's sinks have. Documents differ in length."""
    optimizer, pipeline = ZeroOptimizer(model, model.mesh, OptimizerSettings()), Pipeline(model)
    lengths = [(3, 5, 8), (8, 1, 7), (16,)]
    batches = [
        batch._replace(weights=batch.weights.double(), document_lengths=documents)
        for batch, documents in zip(micro_batches(model.config, 3), lengths, strict=True)
    ]
    model.eval()
    losses = [pipeline.forward(batches).item()]
    model.train()
    seed_step(1, 1, model.mesh)
    optimizer.begin_step(len(batches))
    losses.append(pipeline.forward_backward(batches, scale=1.0).item())
    return losses, {name: grad.clone() for name, (_, grad) in optimizer.complete_gradients().items()}


def close(got: tuple[list[float], dict[str, Tensor]], want: tuple[list[float], dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("llama", MODES[0]), ("llama", MODES[1]), ("falcon-two-norms", NONE)],
    ids=lambda value: value if isinstance(value, str) else mode_name(value),
)
def test_the_same_step(name: str, recompute: Recompute) -> None:
    config = replace(CONFIGS[name], num_hidden_layers=LAYERS)
    want = step(model_of(config, recompute, dropout=DROPOUT, dtype=torch.float64))
    assert graphs() == 0
    model = compiled(config, recompute)
    found = graphs()
    assert 0 < found <= 10, "once per shape and kind of pass, however many layers there are"
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in model.model.layers.values():
        parts = [layer.input_layernorm.forward, layer.self_attn.rotate, layer.mlp.act]
        assert all(hasattr(part, "_torchdynamo_orig_callable") for part in parts), "each layer has what is compiled"
    close(step(model), want)
    assert graphs() == found, "nothing is left to compile in a step"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_selective_recompute_calls_what_is_compiled() -> None:
    """The backward pass computes again with the same code, whose rounding is its own."""
    model, calls = compiled(LLAMA, MODES[0]), []
    layer = model.model.layers["1"]
    act, norm = layer.mlp.act, layer.post_attention_layernorm.forward
    layer.mlp.act = lambda *x: calls.append("act") or act(*x)
    layer.post_attention_layernorm.forward = lambda x: calls.append("norm") or norm(x)
    loss = model.forward_chunk(0, None, micro_batches(LLAMA, 1)[0])
    assert calls == ["norm", "act"]
    loss.backward()
    assert calls == ["norm", "act", "act", "norm"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        ValueError, match=r"^compile=True, but torch\.compile does not work here: RuntimeError: no working compiler"
    ) as error:
        compile_layers(model_of(LLAMA, NONE), torch.arange(8), 2)
    assert "It needs a C++ compiler (g++ or clang++, or the one that the environment variable CXX names)" in str(error.value)
    assert str(error.value).endswith("Install what is missing, or set compile to false")


def broken(function: Any, **settings: Any) -> Any:
    """torch.compile with a backend that fails as inductor does."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working compiler was found")

    return real_compile(function, **settings | {"backend": backend})


real_compile = torch.compile
