"""torch.compile for what lies between the matrix products of a layer: norms, rotation, and the activation of the MLP.

Each becomes one kernel per pass, where it takes several otherwise. Products and attention are library kernels already; their
collectives, and the sinks of their gradients, are no matter for a graph. So the graphs are whole, without dropout, collectives
and side effects, whatever the layout and the kind of recompute; and all layers share them.
"""

import time
from functools import partial

import torch
from torch import Tensor

from megatron_core_impl.layers.attention import Sequences
from megatron_core_impl.layers.norm import LayerNorm, RMSNorm
from megatron_core_impl.layers.rope import rotation
from megatron_core_impl.models.transformer import DecoderLayer, Transformer


def compile_layers(model: Transformer, positions: Tensor, batch_size: int, *, backend: str = "inductor") -> float:
    """Compile parts of the layers for the shape of the micro batches, for training and for evaluation. Every rank calls it.

    It comes before the optimizer, whose sinks take gradients, and runs the first layer once, whatever the weights are: so it
    fails now or never, and its time is known.

    Args:
        positions: of a micro batch's tokens, [S], or [B, S] where sequences differ.
        batch_size: B, its sequences.
        backend: of torch.compile.

    Returns:
        Seconds.

    Raises:
        ValueError: the compiler does not work here; the message says what it needs.
    """
    begun = time.perf_counter()
    from torch._dynamo.exc import TorchDynamoException  # takes a second or two

    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    layers = [layer for layer in model.model.layers.values() if isinstance(layer, DecoderLayer)]
    for layer in layers:
        for module in layer.children():
            if isinstance(module, RMSNorm | LayerNorm):
                module.forward = compiled(module.forward)  # type: ignore[method-assign]  # the module's hooks stay outside
        layer.self_attn.rotate, layer.mlp.act = compiled(layer.self_attn.rotate), compiled(layer.mlp.act)
    tokens = batch_size * positions.shape[-1] // model.mesh.layout.tp
    x = torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype, device=positions.device)
    sequences = Sequences(batch_size, rotation(positions, model.speeds, model.dtype))
    try:
        _run(layers[0], x, sequences)
    except TorchDynamoException as error:
        raise ValueError(_advice(error, positions.device)) from error
    return time.perf_counter() - begun


def _run(layer: DecoderLayer, x: Tensor, sequences: Sequences) -> None:
    """The passes of a training step, and that of an evaluation."""
    layer(x.clone().requires_grad_(), sequences).sum().backward()
    for parameter in layer.parameters():
        parameter.grad = None
    with torch.no_grad():
        layer(x, sequences)


def _advice(error: Exception, device: torch.device) -> str:
    needs = "a C++ compiler (g++ or clang++, or the one that the environment variable CXX names)"
    if device.type == "cuda":
        needs += f" and triton, of the version that belongs to torch {torch.__version__}"
    inner = getattr(error, "inner_exception", error)  # a backend's own
    reason = f"{type(inner).__name__}: {inner}".splitlines()[0]
    return (
        f"compile=True, but torch.compile does not work here: {reason.rstrip('.')}. It needs {needs}. Install what is "
        "missing, or set compile to false"
    )
